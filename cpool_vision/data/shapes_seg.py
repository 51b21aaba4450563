"""`cpool/shapes-seg`: generated images with several objects of many sizes, and the class of every pixel."""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from PIL import Image

from .scene import OUTLINES, TEXTURES
from .shapes import SPLITS, STREAMS
from .shapes_crowd import Crowd, render_crowds

_DEFAULT_SAMPLES = {'train': 4_000, 'validation': 1_000, 'test': 1_000}
_CHUNK_BYTES = 1 << 20
_TEXTURES = 3


class ShapesSegDataset(torch.utils.data.Dataset):
    """Segmentation of textured objects of widely varying size on cluttered backgrounds: 6 classes and the background.

    A class is one of two outlines times one of three textures. Textures grow with their objects: an object twice as
    large looks the same, magnified, so a model must see the whole object to recognize it. Flat objects and patches of
    texture without an outline belong to the background. Sample i of a split depends only on (`data_seed`, split, i) and
    the sizes: it is the same on every machine, in every worker and for any `num_samples`. Items are the image and its
    mask, a PIL image of mode 'L' with class indices, 0 for the background.

    Args:
        split: 'train', 'validation' or 'test' (or a synonym that timm knows).
        num_samples: Number of samples; by default 4,000 for train, 1,000 for other splits.
        image_size: Side in pixels; scenes are the same at every size.
        mean_radius: Geometric mean of the smallest and the largest radius, in 64ths of the side.
        size_range: Largest radius relative to the smallest. The default gives radii of 4 to 16 pixels at size 64.
        objects: Number of objects per image.
        transform: Applied to the PIL image.
        target_transform: Applied to the mask.
        data_seed: Seed of the images.

    Raises:
        ValueError: The split is unknown, or a number is out of range.
    """

    classes: tuple[str, ...] = (
        'ground', *(f'{texture}_{outline}' for outline in OUTLINES for texture in TEXTURES[:_TEXTURES]))

    def __init__(
            self,
            split: str = 'train',
            num_samples: int | None = None,
            image_size: int = 64,
            mean_radius: float = 8.0,
            size_range: float = 4.0,
            objects: int = 4,
            transform: Callable[..., Any] | None = None,
            target_transform: Callable[..., Any] | None = None,
            data_seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f'unknown split {split!r} of cpool/shapes-seg: choose one of {sorted(STREAMS)}')
        self.split = SPLITS[split]
        self.num_samples = _DEFAULT_SAMPLES[self.split] if num_samples is None else int(num_samples)
        if self.num_samples < 1:
            raise ValueError(f'num_samples must be >= 1, got {num_samples}; leave it out for the default')
        if not 16 <= image_size <= 1024:
            raise ValueError(f'image_size must be between 16 and 1024, got {image_size}')
        if not 1 <= size_range <= 16:
            raise ValueError(f'size_range must be between 1 (one size) and 16, got {size_range}')
        if not 1 <= mean_radius <= 32:
            raise ValueError(f'mean_radius must be between 1 and 32 (64ths of the side), got {mean_radius}')
        if not 1 <= objects <= 16:
            raise ValueError(f'objects must be between 1 and 16, got {objects}')
        if not 0 <= data_seed < 1 << 64:
            raise ValueError(f'data_seed must be >= 0 and below 2^64, got {data_seed}')
        self.image_size = int(image_size)
        self.mean_radius = float(mean_radius)
        self.size_range = float(size_range)
        self.objects = int(objects)
        self.data_seed = int(data_seed)
        self.transform = transform
        self.target_transform = target_transform

    @property
    def num_classes(self) -> int:
        """Number of classes, including the background."""
        return len(self.classes)

    def __len__(self) -> int:
        return self.num_samples

    def render(self, indices: NDArray[Any]) -> Crowd:
        """Renders images, masks and radii of the samples `indices`, in about 3 ms each."""
        return render_crowds(
            self.data_seed, STREAMS[self.split], indices, self.image_size, self.mean_radius, self.size_range,
            self.objects, _TEXTURES)

    def arrays(self) -> Crowd:
        """Renders images, masks and radii of the whole split; nothing is cached."""
        step = max(1, _CHUNK_BYTES // (12 * self.image_size ** 2))
        parts = [
            self.render(np.arange(start, min(start + step, len(self)))) for start in range(0, len(self), step)]
        return Crowd(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} samples')
        crowd = self.render(np.asarray([int(index) % len(self)]))
        image, mask = Image.fromarray(crowd.pixels[0]), Image.fromarray(crowd.masks[0])
        return (
            image if self.transform is None else self.transform(image),
            mask if self.target_transform is None else self.target_transform(mask),
        )
