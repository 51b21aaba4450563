"""Settings that train.py and validate.py share, with the names, defaults and meanings of timm's flags."""
import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from .flags import Settings, flag


def task_name(text: str) -> str:
    """Returns the name of a task. Accepts timm's spelling `multilabel`."""
    return 'multi_label' if text == 'multilabel' else text


class InputConfig(TypedDict):
    """Input of a model, with the keys of timm's data configuration.

    Attributes:
        input_size: Channels, height and width.
        interpolation: Interpolation mode for resizing.
        mean: Channel means of images scaled to 0..1.
        std: Channel standard deviations of images scaled to 0..1.
        crop_pct: Side of the evaluation crop divided by the side of the resized image.
        crop_mode: center, squash or border.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Device and arithmetic."""

    title = 'device and arithmetic'
    device: str = flag('cuda', 'device (default: CUDA if available, else the CPU)')
    amp: bool = flag(False, 'mixed precision by autocast')
    amp_dtype: str = flag('float16', 'autocast dtype: float16 or bfloat16')
    model_dtype: str | None = flag(None, 'dtype of the weights without autocast (default: float32)')
    fuser: str = flag('', 'fuser of TorchScript: te, old or nvfuser')
    fast_norm: bool = flag(False, "timm's reduced-precision norm layers under autocast")
    device_modules: tuple[str, ...] | None = flag(None, 'Python modules to import first (device backends)')
    deterministic: bool = flag(
        False, 'use deterministic algorithms for bit-identical results; slower on CUDA, and an error if an operation '
            'has none')


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model and its input. None stands for the model's own value."""

    title = 'model and its input'
    model: str = flag(
        'resnet50', 'registered name, local-dir:FOLDER or hf-hub:OWNER/NAME (default: resnet50)', metavar='MODEL')
    pretrained: bool = flag(False, "start from the model's pretrained weights")
    num_classes: int | None = flag(None, "number of classes (default: the model's)", metavar='N')
    gp: str | None = flag(None, 'global pooling of the model', metavar='POOL')
    in_chans: int | None = flag(None, 'number of image channels (default: 3)', metavar='N')
    img_size: int | None = flag(None, 'side of a square input image, in pixels', metavar='N')
    input_size: tuple[int, ...] | None = flag(
        None, 'input as channels height width, e.g. --input-size 3 224 224', metavar='N', nargs=3)
    crop_pct: float | None = flag(None, 'side of the evaluation crop relative to the resized side', metavar='N')
    mean: tuple[float, ...] | None = flag(None, 'channel means, images scaled to 0..1', metavar='MEAN')
    std: tuple[float, ...] | None = flag(None, 'channel standard deviations', metavar='STD')
    interpolation: str = flag('', 'how evaluation images are resized', metavar='NAME')
    channels_last: bool = flag(False, 'NHWC memory layout')
    model_kwargs: Mapping[str, Any] = flag(
        {}, 'more arguments of the model, e.g. --model-kwargs cpool_positions=[] img_size=64', metavar='KEY=VALUE')
    torchscript: bool = flag(False, 'script the model with torch.jit', exclusive='code generation')
    torchcompile: str | None = flag(None, 'compile the model with torch.compile (default backend: inductor)',
        metavar='BACKEND', nargs='?', const='inductor', exclusive='code generation')
    torchcompile_mode: str | None = flag(None, 'mode of torch.compile')


@dataclass(frozen=True, kw_only=True)
class NaflexSettings(Settings):
    """Training and validation on patch sequences with the native aspect ratio of images."""

    title = 'NaFlex loader'
    naflex_loader: bool = flag(False, 'use the NaFlex loader')
    naflex_train_seq_lens: tuple[int, ...] = flag((128, 256, 576, 784, 1024), 'sequence lengths to train with')
    naflex_max_seq_len: int = flag(576, 'sequence length in validation')
    naflex_patch_sizes: tuple[int, ...] | None = flag(None, 'patch sizes to draw from')
    naflex_patch_size_probs: tuple[float, ...] | None = flag(None, 'their probabilities')
    naflex_loss_scale: str = flag('linear', 'scale the loss by batch size', choices=('none', 'sqrt', 'linear'))
    naflex_patchify_channels_first: bool = flag(False, 'flatten patches with channels first')


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Batch size and seed."""

    title = 'batches'
    batch_size: int = flag(128, 'images per batch and process (default: 128)', '-b', metavar='N')
    seed: int = flag(42, 'random seed (default: 42)', metavar='S')


@dataclass(frozen=True, kw_only=True)
class DataSettings(BatchSettings, NaflexSettings):
    """Images, labels and data loading."""

    title = 'data and labels'
    data: str | None = flag(None, 'root folder of the data (--data-dir is preferred)', 'data', metavar='DIR', nargs='?')
    data_dir: str | None = flag(None, 'root folder of the data', metavar='DIR')
    dataset: str = flag('',
        'dataset: empty for a folder of class folders or a tar file, cpool/shapes for the built-in dataset, or a '
        'timm name: torch/..., hfds/..., hfids/..., tfds/..., wds/...', metavar='NAME')
    dataset_download: bool = flag(False, 'download torch/ and tfds/ datasets')
    class_map: str | Mapping[str, int] = flag('', 'file that maps class names to indices', metavar='FILENAME')
    input_img_mode: str | None = flag(None, 'PIL mode that images are converted to (by default RGB or L)')
    input_key: str | None = flag(None, 'name of the field that holds the image')
    target_key: str | None = flag(None, 'name of the field that holds the label')
    dataset_trust_remote_code: bool = flag(
        False, 'let a Hugging Face dataset run code from its repository (only if you trust it)')
    task: str = flag('classification',
        'one class per image, or multi_label: any number of labels per image (default: classification)',
        choices=('classification', 'multi_label'), type=task_name)
    label_file: str = flag('',
        'multi_label from a folder: CSV or JSON lines with the labels of each image, in the folder of the split or in '
        '--data-dir; {split} stands for the name of the split (default: labels.csv, labels.jsonl, metadata.csv or '
        'metadata.jsonl)', metavar='FILE')
    target_format: str | None = flag(
        None, 'multi_label: whether the label field holds a list of labels or one number per class (default: indices)',
        choices=('indices', 'multihot'))
    threshold: float = flag(0.5, 'multi_label: labels with at least this probability count as predicted (default: 0.5)',
        '--multilabel-threshold', metavar='P')
    max_bad_samples: float = flag(0.001,
        'how many unreadable images to tolerate before the run stops: a number, or a fraction of the split if below 1 '
        '(default: 0.001); they are replaced in training and skipped in validation', metavar='N')
    epoch_repeats: float = flag(0.0, 'passes over a streamed dataset per epoch', metavar='N')
    workers: int = flag(4, 'data loading processes per device', '-j', metavar='N')
    pin_mem: bool = flag(False, 'page-locked host memory for faster copies to the GPU')
    no_prefetcher: bool = flag(False, "normalize on the CPU instead of in timm's device-side prefetcher")

    @property
    def multi_label(self) -> bool:
        """Whether images have any number of labels."""
        return self.task == 'multi_label'


def settings_of(content: Mapping[str, object]) -> Mapping[str, object]:
    """Returns the settings that a checkpoint was trained with, by name; empty if it holds none."""
    args = content.get('args')
    if isinstance(args, argparse.Namespace):  # timm's own checkpoints
        return vars(args)
    return args if isinstance(args, Mapping) else {}
