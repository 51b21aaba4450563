"""Flags that training and validation share, by timm's names, defaults and meanings."""
import argparse
from typing import Any, Protocol

from timm.utils import ParseKwargs

from cpool_vision.version import __version__

TASKS = ('classification', 'multi_label')


class SupportsAddArgument(Protocol):
    """What `argparse` parsers and groups have in common."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action: ...


def switch(group: SupportsAddArgument, *names: str, **options: Any) -> None:
    """Adds a flag that is off unless given."""
    group.add_argument(*names, action='store_true', default=False, **options)


def add_version_arg(parser: argparse.ArgumentParser) -> None:
    """`--version`: prints the version and exits."""
    parser.add_argument('--version', action='version', version=f'cpool_vision {__version__}',
                        help='print the version and exit')


def add_config_arg(parser: argparse.ArgumentParser) -> None:
    """`-c/--config`: settings that replace the parser's defaults (see `engine.settings.config`)."""
    parser.add_argument(
        '-c', '--config', default='', type=str, metavar='NAME|FILE',
        help='a recipe of the package by its name (list prints them), or a YAML file of settings; its keys are flag '
             'names, and the command line overrides them')


def add_dataset_args(group: SupportsAddArgument) -> None:
    """Where the images come from."""
    add = group.add_argument
    add('--data-dir', metavar='DIR', help='root folder of the data')
    add('--dataset', metavar='NAME', default='',
        help='data set: empty for a folder of class folders or a tar, cpool/shapes for the built-in set, or a name '
             'that timm knows: torch/..., hfds/..., hfids/..., tfds/..., wds/...')
    switch(group, '--dataset-download', help='let torch/ and tfds/ data sets download themselves')
    add('--class-map', default='', type=str, metavar='FILENAME', help='file that maps class names to indices')
    add('--input-img-mode', default=None, type=str, help='PIL mode that images are converted to (by default RGB or L)')
    add('--input-key', default=None, type=str, help='name of the field that holds the image')
    add('--target-key', default=None, type=str, help='name of the field that holds the label')
    switch(group, '--dataset-trust-remote-code',
           help='let a Hugging Face data set run code from its repository (only for repositories you trust)')


def add_input_args(group: SupportsAddArgument) -> None:
    """What the model is fed with; whatever is left out comes from the model's own configuration."""
    add = group.add_argument
    add('--num-classes', type=int, default=None, metavar='N', help='number of classes (model default if left out)')
    add('--gp', default=None, type=str, metavar='POOL', help='global pooling of the model')
    add('--img-size', type=int, default=None, metavar='N', help='side of a square input image, in pixels')
    add('--in-chans', type=int, default=None, metavar='N', help='number of image channels (3 if left out)')
    add('--input-size', default=None, nargs=3, type=int, metavar='N',
        help='input as channels height width, e.g. --input-size 3 224 224')
    add('--crop-pct', default=None, type=float, metavar='N', help='side of the evaluation crop over the resized side')
    add('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='channel means, images scaled to 0..1')
    add('--std', type=float, nargs='+', default=None, metavar='STD', help='channel standard deviations')
    add('--interpolation', default='', type=str, metavar='NAME', help='how evaluation images are resized')


def add_model_form_args(group: SupportsAddArgument) -> None:
    """Layout and code generation of the model."""
    add = group.add_argument
    switch(group, '--channels-last', help='NHWC memory layout')
    add('--fuser', default='', type=str, help='fuser of TorchScript: te, old or nvfuser')
    switch(group, '--fast-norm', help="timm's reduced-precision norm layers under autocast")
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='further arguments of the model, e.g. --model-kwargs cpool_positions=[] img_size=64')
    add('--torchcompile-mode', type=str, default=None, help='mode passed on to torch.compile')


def add_device_args(group: SupportsAddArgument) -> None:
    """Device and arithmetic."""
    add = group.add_argument
    add('--device', default='cuda', type=str,
        help='device to run on; when not given and there is no CUDA device, the CPU is used')
    switch(group, '--amp', help='mixed precision by autocast')
    add('--amp-dtype', default='float16', type=str, help='autocast dtype: float16 or bfloat16')
    add('--model-dtype', default=None, type=str, help='dtype of the weights without autocast (float32 if left out)')


def add_loader_args(group: SupportsAddArgument) -> None:
    """How batches reach the device."""
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes per device')
    switch(group, '--pin-mem', help='page-locked host memory for faster copies to the GPU')
    switch(group, '--no-prefetcher', help="normalise on the CPU instead of in timm's device-side prefetcher")


def _task(name: str) -> str:
    return 'multi_label' if name == 'multilabel' else name  # timm's spelling


def add_task_args(group: SupportsAddArgument) -> None:
    """One class for each image, or any number of labels."""
    add = group.add_argument
    add('--task', type=_task, default='classification', choices=TASKS,
        help='one class for each image, or multi_label: any number of labels, also none (default: classification)')
    add('--label-file', type=str, default='', metavar='FILE',
        help='multi_label from a folder: CSV or JSON lines with the labels of each image, in the folder of the split '
             'or in --data-dir; {split} stands for the name of the split (default: labels.csv, labels.jsonl, '
             'metadata.csv or metadata.jsonl)')
    add('--target-format', type=str, default=None, choices=('indices', 'multihot'),
        help='multi_label: what the label field holds, a list of labels or one number per class (default: indices)')
    add('--threshold', '--multilabel-threshold', type=float, default=0.5, metavar='P',
        help='multi_label: probability from which a label counts as predicted (default: 0.5)')
