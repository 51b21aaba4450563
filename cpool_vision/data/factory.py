"""`create_dataset`: timm's dataset factory, plus the datasets that this package generates."""
import re
from typing import Any

import timm.data
import torch.utils.data

from .shapes import ShapesDataset
from .shapes_seg import ShapesSegDataset

PREFIX = 'cpool/'
_SHAPES = re.compile(r'shapes(-seg)?(\d{1,4})?')
# arguments of timm's factory that generated datasets ignore; `seed` is the seed of the shuffle
_NOT_FOR_OURS = (
    'search_split', 'load_bytes', 'is_training', 'download', 'batch_size', 'seed', 'repeats', 'trust_remote_code',
    'input_key', 'target_key',
)


def list_datasets() -> list[str]:
    """Returns the names under `cpool/` that `create_dataset` knows; `<SIZE>` stands for a side in pixels."""
    return ['cpool/shapes', 'cpool/shapes<SIZE>', 'cpool/shapes-seg', 'cpool/shapes-seg<SIZE>']


def create_dataset(
        name: str,
        root: str | None = None,
        split: str = 'validation',
        **kwargs: Any,
) -> torch.utils.data.Dataset:
    """Creates a dataset by name. Names outside `cpool/` go to `timm.data.create_dataset` unchanged.

    Args:
        name: 'cpool/shapes' (32 pixels), 'cpool/shapes64' (any side), 'cpool/shapes-seg' (64 pixels) or
            'cpool/shapes-seg128' with a mask as the target, or a name that timm knows ('' for a folder).
        root: Folder of the data; ignored by generated datasets.
        split: Name of the split.
        **kwargs: timm's arguments. Generated datasets take `num_samples`, `transform`, `target_transform`,
            `input_img_mode`, `image_size` and `data_seed`, and ignore loader settings of timm's factory (`batch_size`,
            `is_training`, `seed`, ...), so that every training seed sees the same images. 'cpool/shapes-seg' also takes
            `mean_radius`, `size_range` and `objects`, but not `input_img_mode`.

    Returns:
        A dataset whose items are `(image, class index)`, or `(image, mask)`.

    Raises:
        ValueError: The name under `cpool/` or the split is unknown, `num_samples` is below 1, or a `class_map` is given
            for a generated dataset.
        TypeError: Neither timm's factory nor the dataset knows an argument.
    """
    if not name.lower().startswith(PREFIX):
        return timm.data.create_dataset(name, root=root, split=split, **kwargs)
    match = _SHAPES.fullmatch(name[len(PREFIX):].lower())
    if match is None:
        raise ValueError(f'unknown dataset {name!r}: choose one of {", ".join(list_datasets())}')
    options = {key: value for key, value in kwargs.items() if value is not None and key not in _NOT_FOR_OURS}
    if options.pop('class_map', None):
        raise ValueError(f'class_map does not work with {name!r}, whose classes are fixed: drop it')
    if match.group(2):
        size = int(match.group(2))
        if options.setdefault('image_size', size) != size:
            raise ValueError(f'image_size={options["image_size"]} contradicts the name {name!r}: drop one of the two')
    if match.group(1):
        if options.pop('input_img_mode', 'RGB') != 'RGB':
            raise ValueError(f'{name!r} has RGB images only: drop input_img_mode')
        return ShapesSegDataset(split=split, **options)
    dataset = ShapesDataset(split=split, **options)
    dataset.preload()
    return dataset
