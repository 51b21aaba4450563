"""`cpool/shapes`: a generated dataset for first runs and tests without a download."""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from PIL import Image

from .scene import OUTLINES, TEXTURES, render_scenes

SPLITS = {
    'train': 'train', 'training': 'train',
    'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'eval': 'validation',
    'evaluation': 'validation',
    'test': 'test',
}
STREAMS = {'train': 0, 'validation': 1, 'test': 2}
_DEFAULT_SAMPLES = {'train': 10_000, 'validation': 2_000, 'test': 2_000}
_CHUNK_BYTES = 1 << 20
_CACHE_BYTES = 1 << 28


class ShapesDataset(torch.utils.data.Dataset):
    """Textured objects of widely varying size on cluttered backgrounds, 10 classes: five outlines times two textures.

    To recognize the class, a model must see the texture (4 to 6 pixels at size 32) and the outline around it (8 to 32
    pixels), and ignore flat objects and patches of texture without an outline, which every image also contains. Color,
    location, orientation and light carry no information. Sample i of a split depends only on (`data_seed`, split, i):
    it is the same on every machine, in every worker and for any `num_samples`. Splits share no samples. The label of
    sample i is `i % 10`.

    Up to 256 MiB of pixels are rendered once, on first use or by `preload`, and kept as one uint8 array; larger
    datasets are rendered image by image.

    Args:
        split: 'train', 'validation' or 'test' (or a synonym that timm knows).
        num_samples: Number of samples; by default 10,000 for train, 2,000 for other splits.
        image_size: Side in pixels.
        transform: Applied to the PIL image; timm's `create_loader` sets it.
        target_transform: Applied to the class index.
        input_img_mode: PIL mode of the image, 'RGB' or 'L'.
        data_seed: Seed of the images.

    Raises:
        ValueError: The split is unknown, or `num_samples`, `image_size` or `data_seed` is out of range.
    """

    classes: tuple[str, ...] = tuple(f'{texture}_{outline}' for outline in OUTLINES for texture in TEXTURES)

    def __init__(
            self,
            split: str = 'train',
            num_samples: int | None = None,
            image_size: int = 32,
            transform: Callable[..., Any] | None = None,
            target_transform: Callable[..., Any] | None = None,
            input_img_mode: str = 'RGB',
            data_seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f'unknown split {split!r} of cpool/shapes: choose one of {sorted(STREAMS)}')
        self.split = SPLITS[split]
        self.num_samples = _DEFAULT_SAMPLES[self.split] if num_samples is None else int(num_samples)
        if self.num_samples < 1:
            raise ValueError(f'num_samples must be >= 1, got {num_samples}; leave it out for the default')
        if not 8 <= image_size <= 1024:
            raise ValueError(f'image_size must be between 8 and 1024, got {image_size}')
        if not 0 <= data_seed < 1 << 64:
            raise ValueError(f'data_seed must be >= 0 and below 2^64, got {data_seed}')
        self.image_size = int(image_size)
        self.data_seed = int(data_seed)
        self.input_img_mode = input_img_mode
        self.transform = transform
        self.target_transform = target_transform
        self._pixels: NDArray[np.uint8] | None = None

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class index of each class name."""
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return self.num_samples

    def _render(self, indices: NDArray[Any]) -> NDArray[np.uint8]:
        label = indices % self.num_classes
        stream = STREAMS[self.split]
        outline, texture = label // len(TEXTURES), label % len(TEXTURES)
        return render_scenes(self.data_seed, stream, indices, outline, texture, self.image_size)

    def pixels(self) -> NDArray[np.uint8]:
        """Returns all images, `(num_samples, image_size, image_size, 3)` uint8; rendered once, in 0.3 ms each."""
        if self._pixels is None:
            side = self.image_size
            pixels = np.empty((len(self), side, side, 3), np.uint8)
            step = max(1, _CHUNK_BYTES // (3 * side * side))
            for start in range(0, len(self), step):
                stop = min(start + step, len(self))
                pixels[start:stop] = self._render(np.arange(start, stop))
            self._pixels = pixels
        return self._pixels

    def preload(self) -> None:
        """Renders all images now if they are small enough to keep, so that worker processes share one copy."""
        if 3 * self.image_size ** 2 * len(self) <= _CACHE_BYTES:
            self.pixels()

    def targets(self) -> NDArray[np.int64]:
        """Returns all class indices, `(num_samples,)`."""
        return np.arange(len(self)) % self.num_classes

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} samples')
        index = int(index) % len(self)
        self.preload()
        pixels = self._render(np.asarray([index]))[0] if self._pixels is None else self._pixels[index]
        image = Image.fromarray(pixels)
        if self.input_img_mode and self.input_img_mode != 'RGB':
            image = image.convert(self.input_img_mode)
        target = index % self.num_classes
        return (
            image if self.transform is None else self.transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Returns a name for a sample, like timm's readers; there is no such file."""
        name = f'{index:06d}.png'
        return name if basename else f'{self.split}/{self.classes[index % self.num_classes]}/{name}'

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Returns the names of all samples, see `filename`."""
        return [self.filename(index, basename, absolute) for index in range(len(self))]
