"""Settings of validate.py: timm's flags with the same names, defaults and meanings, and our own."""
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
    naflex_max_seq_len: int = flag(576, 'maximum number of patches per image with --naflex-loader')
    batch_size: int = flag(256, 'images per batch (default: 256)', '-b', metavar='N')
    max_bad_samples: float = flag(0.0,
        'how many unreadable images to skip before raising an error: a number, or a fraction of the split if below 1 '
        '(default: 0)', metavar='N')
    split: str = flag('validation', 'split to measure (default: validation)', metavar='NAME')
    num_samples: int | None = flag(None, 'size of the split if it is streamed', metavar='N')
    corruptions: str = flag(
        '', 'measure each FOLDER/CORRUPTION/SEVERITY/CLASS/* (the layout of ImageNet-C) instead of --data-dir, and '
        'report the mean',
        metavar='FOLDER')
    checkpoint: str = flag(
        '', 'checkpoint to load, or folder to measure every .pth.tar and .pth file in it', metavar='PATH')
    use_ema: bool = flag(False, 'use the averaged weights of the checkpoint if it has them')
    test_pool: bool = flag(False, 'apply the head densely to inputs larger than in training')
    reparam: bool = flag(False, 'reparameterize the model before measuring')
    aot_autograd: bool = flag(
        False, "fuse the model with functorch's memory_efficient_fusion", exclusive='code generation')
    use_train_size: bool = flag(False, 'use the training input size even if the model has a larger test size')
    tf_preprocessing: bool = flag(False, 'TensorFlow image preprocessing (needs TensorFlow)')
    crop_mode: str | None = flag(None, 'center, squash or border', metavar='N')
    crop_border_pixels: int | None = flag(None, 'pixels to crop from every image border')
    num_gpu: int = flag(1, 'number of GPUs for each batch (DataParallel)')
    retry: bool = flag(False, 'retry with a smaller batch after running out of memory')
    real_labels: str = flag('',
        'JSON file with all correct labels of each image, used for top-1 and top-5: ImageNet ReaL, or a mapping of '
        'file names to lists', metavar='FILENAME')
    valid_labels: str = flag(
        '', 'file of class indices, one per line: predict only these classes (for ImageNet-A, -R, ...)',
        metavar='FILENAME')
    class_subset: str = flag('',
        'imagenet-1k, imagenet-sketch, imagenet-a, imagenet-r, mini-imagenet, imagenet-v2, or a file with lines FOLDER '
        'INDEX or a JSON mapping: class folders to measure; predict only these classes',
        metavar='NAME')
    tta: int = flag(
        0, 'average the logits of N views of each image: 0 or 1 for the image alone, 2 for the image and its mirror '
           'image', metavar='N')
    metrics_avg: str | None = flag(None, 'also report precision, recall and F1 with this average over classes',
        choices=('micro', 'macro', 'weighted'))
    results_file: str = flag(
        '', 'results file: .json (everything), .csv (one line per model) or .md', metavar='FILENAME')
    results_format: str = flag(
        'csv', 'csv, json or md, if --results-file has another suffix (default: csv)')
    predictions: str = flag(
        '', 'write logits, labels and file names of all images, and the confusion matrix', metavar='FILE.npz')
    predictions_topk: int = flag(
        0, 'write the K most probable classes of each image instead of all logits (default: 0, all '
            'logits)', metavar='K')
    plots: str = flag('', 'folder for PNG plots of confusion matrix, reliability diagram and accuracy by class '
        '(needs matplotlib)',
        metavar='FOLDER')
    measure_cost: bool = flag(
        False, 'also measure multiply-adds, latency of one image, throughput without loading, and memory')
    log_freq: int = flag(10, 'batches between log lines (default: 10)', metavar='N')


def build_parser() -> argparse.ArgumentParser:
    """Returns a parser with every flag of validate.py."""
    return flags.build_parser(
        ValidateSettings, 'validate.py', 'Measure the accuracy of one model, or of many, on a labeled image set.')
