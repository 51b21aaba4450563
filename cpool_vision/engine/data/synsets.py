"""The thousand synsets of ImageNet-1k, by which class folders are often named."""
from functools import cache

from timm.data import ImageNetInfo

NAME = 'imagenet-1k'


@cache
def synset_numbers() -> dict[str, int]:
    """Numbers of the 1000 classes by synset (n01440764: 0), in the order that published weights have."""
    return {synset: index for index, synset in enumerate(ImageNetInfo(NAME).label_names())}
