"""Flags of several labels per image, which timm's library serves and its scripts do not have."""
from .args_common import SupportsAddArgument

TASKS = ('classification', 'multi_label')


def add_task_args(group: SupportsAddArgument) -> None:
    """One class for each image, or any number of labels."""
    add = group.add_argument
    add('--task', type=str, default='classification', choices=TASKS,
        help='one class for each image, or multi_label: any number of labels, also none (default: classification)')
    add('--label-file', type=str, default='', metavar='FILE',
        help='multi_label from a folder: CSV or JSON lines with the labels of each image, in the folder of the split '
             'or in --data-dir; {split} stands for the name of the split (default: labels.csv, labels.jsonl, '
             'metadata.csv or metadata.jsonl)')
    add('--target-format', type=str, default=None, choices=('indices', 'multihot'),
        help='multi_label: what the label field holds, a list of labels or one number per class (default: indices)')
    add('--threshold', type=float, default=0.5, metavar='P',
        help='multi_label: probability from which a label counts as predicted (default: 0.5)')
