"""Fixes timm's posterize operation for Pillow releases that reject zero bits."""
from PIL import Image
from timm.data import auto_augment

_NAMES = ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal')
_timm_posterize = auto_augment.posterize


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: object) -> Image.Image:
    """timm's posterize, which returns a black image for zero bits.

    Policies such as rand-m9-mstd0.5-inc1 draw magnitude 10, i.e. zero bits, in about 2 % of cases. Earlier Pillow
    releases returned a black image; Pillow 13 raises ValueError in the middle of an epoch.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return _timm_posterize(image, bits_to_keep, **kwargs)


def allow_zero_bits() -> None:
    """Makes augmentation policies that timm builds from now on use this `posterize`."""
    for name in _NAMES:
        auto_augment.NAME_TO_OP[name] = posterize
