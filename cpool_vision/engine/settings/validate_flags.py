"""Parser of validate.py: timm's flags by the same name, default and meaning."""
import argparse

from .limits import show_limits
from .shared_flags import (
    SupportsAddArgument,
    add_dataset_args,
    add_device_args,
    add_input_args,
    add_loader_args,
    add_model_form_args,
    add_task_args,
    add_version_arg,
    switch,
)

SUBSETS = ('imagenet-1k', 'imagenet-sketch', 'imagenet-a', 'imagenet-r', 'mini-imagenet', 'imagenet-v2')


def build_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag of validate.py."""
    parser = argparse.ArgumentParser(
        prog='validate.py', description='Measure the accuracy of one model, or of many, on a labelled image set.')
    add_version_arg(parser)
    parser.add_argument('data', nargs='?', metavar='DIR', help='root folder of the data (--data-dir is preferred)')

    group = parser.add_argument_group('data')
    add_dataset_args(group)
    group.add_argument('--split', metavar='NAME', default='validation', help='split to measure (default: validation)')
    group.add_argument('--num-samples', default=None, type=int, metavar='N', help='size of the split, if streamed')
    group.add_argument(
        '--corruptions', default='', metavar='FOLDER',
        help='measure each FOLDER/CORRUPTION/SEVERITY/CLASS/* (as of ImageNet-C) in place of --data-dir, and the mean')
    group.add_argument(
        '--max-bad-samples', type=float, default=0., metavar='N',
        help='unreadable images to leave out of the figures before it is an error: a number, or below 1 a share of the '
             'split, rounded up (default: 0)')
    add_loader_args(group)
    group.add_argument('-b', '--batch-size', default=256, type=int, metavar='N', help='images per batch (default: 256)')
    switch(group, '--tf-preprocessing', help='TensorFlow image preprocessing (needs TensorFlow)')

    group = parser.add_argument_group('model')
    group.add_argument(
        '--model', '-m', metavar='NAME', default='dpn92',
        help="registered name, local-dir:FOLDER, hf-hub:OWNER/NAME, a wildcard, 'all', or a file of names")
    switch(group, '--pretrained', dest='pretrained', help="load the model's pretrained weights")
    group.add_argument(
        '--checkpoint', default='', type=str, metavar='PATH',
        help='checkpoint to load, or a folder: every .pth.tar and .pth in it is measured')
    switch(group, '--use-ema', dest='use_ema', help='take the averaged weights from the checkpoint if it has them')
    switch(group, '--test-pool', dest='test_pool', help='pool the head densely over inputs larger than in training')
    switch(group, '--reparam', help='merge branches that the model can merge before measuring')
    add_model_form_args(group)
    codegen = group.add_mutually_exclusive_group()
    switch(codegen, '--torchscript', help='script the model with torch.jit')
    codegen.add_argument(
        '--torchcompile', nargs='?', type=str, default=None, const='inductor', metavar='BACKEND',
        help='compile the model with torch.compile (backend inductor if none is named)')
    switch(codegen, '--aot-autograd', help="fuse the model with functorch's memory_efficient_fusion")

    group = parser.add_argument_group('input')
    add_input_args(group)
    switch(group, '--use-train-size', help='training input size even where the model names a larger one for tests')
    group.add_argument('--crop-mode', default=None, type=str, metavar='N', help='center, squash or border')
    group.add_argument('--crop-border-pixels', type=int, default=None, help='pixels cut from every image border')

    group = parser.add_argument_group('device')
    add_device_args(group)
    group.add_argument('--num-gpu', type=int, default=1, help='GPUs to split each batch over (DataParallel)')
    switch(group, '--retry', help='after running out of memory try again with a smaller batch')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed (default: 42)')

    group = parser.add_argument_group('labels')
    add_task_args(group)
    _add_label_args(group)
    _add_result_args(parser.add_argument_group('results'))

    group = parser.add_argument_group('NaFlex loader')
    switch(group, '--naflex-loader', help='sequences of patches at native aspect ratio')
    group.add_argument('--naflex-max-seq-len', type=int, default=576, help='patches per image at most')
    show_limits(parser)
    return parser


def _add_label_args(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add('--real-labels', default='', type=str, metavar='FILENAME',
        help='JSON of all right labels of each image, by which top-1 and top-5 then go: ImageNet ReaL, or a mapping of '
             'file names to lists')
    add('--valid-labels', default='', type=str, metavar='FILENAME',
        help='file of class indices, one a line: only these outputs compete (ImageNet-A, -R and the like)')
    add('--class-subset', default='', metavar='NAME',
        help=f'{", ".join(SUBSETS)}, or a file with lines FOLDER INDEX or a JSON mapping: class folders to measure, '
             'and the outputs that they stand for, which alone compete')
    add('--tta', type=int, default=0, metavar='N',
        help="views of each image whose logits are averaged: 0 or 1 the image alone, 2 also its mirror image (N is not "
             "timm's number of adjacent samples)")
    add('--metrics-avg', type=str, default=None, choices=['micro', 'macro', 'weighted'],
        help='also report precision, recall and F1, averaged over classes in this way')


def _add_result_args(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add('--results-file', default='', type=str, metavar='FILENAME',
        help='write the results here: .json (everything), .csv (one line a model) or .md')
    add('--results-format', default='csv', type=str,
        help='csv, json or md, where the suffix of --results-file is none of them (default: csv)')
    add('--predictions', default='', metavar='FILE.npz',
        help='write logits, labels and file names of all images, and the confusion matrix')
    add('--predictions-topk', type=int, default=0, metavar='K',
        help='in place of all logits, the K most probable classes of each image (default: 0, all logits)')
    add('--plots', default='', metavar='FOLDER',
        help='draw confusion matrix, reliability diagram and accuracy by class as PNG (needs matplotlib)')
    switch(group, '--measure-cost',
           help='also multiply-adds, latency of one image, throughput of the model without loading, and memory')
    add('--log-freq', default=10, type=int, metavar='N', help='batches between log lines (default: 10)')
