"""Flags of the training loader that timm's train.py does not have."""
from .args_common import SupportsAddArgument


def add_bad_sample_args(group: SupportsAddArgument) -> None:
    """What to do about images that cannot be decoded."""
    group.add_argument(
        '--max-bad-samples', type=float, default=0.001, metavar='N',
        help='unreadable training images to replace and list, and validation images to leave out, before the run '
             'stops: a number, or below 1 a share of the split, rounded up (default: 0.001)')
