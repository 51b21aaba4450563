"""Repair of timm's posterize operation for Pillow releases that refuse zero bits."""
from typing import Any

from PIL import Image
from timm.data import auto_augment

_NAMES = ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal')
_timm_posterize = auto_augment.posterize


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, where zero bits give a black image instead of an error.

    Policies such as rand-m9-mstd0.5-inc1 draw magnitude 10 in about 2 % of cases, which leaves zero bits. Earlier
    Pillow releases returned the black image; Pillow 13 raises ValueError in the middle of an epoch.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return _timm_posterize(image, bits_to_keep, **kwargs)


def allow_zero_bits() -> None:
    """Makes timm's augmentation policies that are built from now on use `posterize`."""
    for name in _NAMES:
        auto_augment.NAME_TO_OP[name] = posterize
