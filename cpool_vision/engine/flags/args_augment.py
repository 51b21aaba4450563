"""The flag of augmentation that timm's train.py does not have."""
from .args_common import SupportsAddArgument


def add_pipeline_args(group: SupportsAddArgument) -> None:
    """A pipeline of albumentations in place of timm's training transforms."""
    group.add_argument(
        '--aug-config', default='', type=str, metavar='NAME|FILE',
        help='augment with albumentations instead: a preset (cifar, imagenet, light, strong) or a .yaml or .json file, '
             'see docs/augmentation.md')
