"""Strong RandAugment policies do not stop an epoch."""

import pytest
from PIL import Image, ImageOps
from timm.data import auto_augment

from cpool_vision.engine.data.posterize import allow_zero_bits, posterize


@pytest.mark.parametrize('name', ['PosterizeIncreasing', 'Posterize', 'PosterizeOriginal'])
def test_every_magnitude_gives_an_image(name: str) -> None:
    allow_zero_bits()
    image = Image.linear_gradient('L').convert('RGB')
    for magnitude in range(11):
        done = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude)(image)
        assert done.size == image.size
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3


def test_other_bits_are_those_of_pillow() -> None:
    image = Image.linear_gradient('L').convert('RGB')
    for bits in range(1, 9):
        assert posterize(image, bits).tobytes() == ImageOps.posterize(image, bits).tobytes()
