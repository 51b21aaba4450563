"""Settings of validate.py: timm's flags by the same name, default and meaning, and ours."""
import argparse
from dataclasses import dataclass

from . import flags
from .flags import flag
from .shared import DataSettings, DeviceSettings, ModelSettings

SUBSETS = ('imagenet-1k', 'imagenet-sketch', 'imagenet-a', 'imagenet-r', 'mini-imagenet', 'imagenet-v2')


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(DeviceSettings, ModelSettings, DataSettings):
    """Every setting of validate.py."""

    title = 'measurement and results'
    without = frozenset({
        'deterministic', 'device_modules', 'epoch_repeats', 'naflex_loss_scale',
        'naflex_patch_size_probs', 'naflex_patch_sizes', 'naflex_patchify_channels_first', 'naflex_train_seq_lens'})
    model: str = flag(
        'dpn92', "registered name, local-dir:FOLDER, hf-hub:OWNER/NAME, a wildcard, 'all', or a file of names",
        '-m', metavar='NAME')
    pretrained: bool = flag(False, "load the model's pretrained weights")
    naflex_max_seq_len: int = flag(576, 'patches per image at most with --naflex-loader')
    batch_size: int = flag(256, 'images per batch (default: 256)', '-b', metavar='N')
    max_bad_samples: float = flag(0.0,
        'how many unreadable images to leave out before it is an error: a number, or a fraction of the split if below '
        '1 (default: 0)', metavar='N')
    split: str = flag('validation', 'split to measure (default: validation)', metavar='NAME')
    num_samples: int | None = flag(None, 'size of the split, if streamed', metavar='N')
    corruptions: str = flag(
        '', 'measure each FOLDER/CORRUPTION/SEVERITY/CLASS/* (as of ImageNet-C) in place of --data-dir, and the mean',
        metavar='FOLDER')
    checkpoint: str = flag(
        '', 'checkpoint to load, or a folder: every .pth.tar and .pth in it is measured', metavar='PATH')
    use_ema: bool = flag(False, 'take the averaged weights from the checkpoint if it has them')
    test_pool: bool = flag(False, 'pool the head densely over inputs larger than in training')
    reparam: bool = flag(False, 'merge branches that the model can merge before measuring')
    aot_autograd: bool = flag(
        False, "fuse the model with functorch's memory_efficient_fusion", exclusive='code generation')
    use_train_size: bool = flag(False, 'training input size even where the model names a larger one for tests')
    tf_preprocessing: bool = flag(False, 'TensorFlow image preprocessing (needs TensorFlow)')
    crop_mode: str | None = flag(None, 'center, squash or border', metavar='N')
    crop_border_pixels: int | None = flag(None, 'pixels cut from every image border')
    num_gpu: int = flag(1, 'GPUs to split each batch over (DataParallel)')
    retry: bool = flag(False, 'after running out of memory try again with a smaller batch')
    real_labels: str = flag('',
        'JSON of all right labels of each image, by which top-1 and top-5 then go: ImageNet ReaL, or a mapping of file '
        'names to lists', metavar='FILENAME')
    valid_labels: str = flag(
        '', 'file of class indices, one a line: only these outputs compete (ImageNet-A, -R and the like)',
        metavar='FILENAME')
    class_subset: str = flag('',
        'imagenet-1k, imagenet-sketch, imagenet-a, imagenet-r, mini-imagenet, imagenet-v2, or a file with lines FOLDER '
        'INDEX or a JSON mapping: class folders to measure, and the outputs that they stand for, which alone compete',
        metavar='NAME')
    tta: int = flag(
        0, 'views of each image whose logits are averaged: 0 or 1 the image alone, 2 also its mirror image (N is not '
        "timm's number of adjacent samples)", metavar='N')
    metrics_avg: str | None = flag(None, 'also report precision, recall and F1, averaged over classes in this way',
        choices=('micro', 'macro', 'weighted'))
    results_file: str = flag(
        '', 'write the results here: .json (everything), .csv (one line a model) or .md', metavar='FILENAME')
    results_format: str = flag(
        'csv', 'csv, json or md, where the suffix of --results-file is none of them (default: csv)')
    predictions: str = flag(
        '', 'write logits, labels and file names of all images, and the confusion matrix', metavar='FILE.npz')
    predictions_topk: int = flag(
        0, 'in place of all logits, the K most probable classes of each image (default: 0, all logits)', metavar='K')
    plots: str = flag('', 'draw confusion matrix, reliability diagram and accuracy by class as PNG (needs matplotlib)',
        metavar='FOLDER')
    measure_cost: bool = flag(
        False, 'also multiply-adds, latency of one image, throughput of the model without loading, and memory')
    log_freq: int = flag(10, 'batches between log lines (default: 10)', metavar='N')


def build_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag of validate.py."""
    return flags.build_parser(
        ValidateSettings, 'validate.py', 'Measure the accuracy of one model, or of many, on a labelled image set.')
