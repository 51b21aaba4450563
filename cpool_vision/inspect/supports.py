"""How far each context pool of a model looks: mean and quantiles of its supports for a batch of images."""
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .maps import ContextMaps

QUANTILES = (0.05, 0.5, 0.95)


class SupportStatistics(NamedTuple):
    """Supports of one context pool over images, output cells and groups, in pixels of the image.

    Attributes:
        layer: name of the pool in the model.
        mean: mean.
        q05, q50, q95: quantiles.
    """

    layer: str
    mean: float
    q05: float
    q50: float
    q95: float


def support_statistics(maps: Mapping[str, ContextMaps], image_size: tuple[int, int]) -> list[SupportStatistics]:
    """Statistics of the supports of each pool, in order of execution.

    Args:
        maps: what `context_maps` found.
        image_size: (height, width) of the images.

    Returns:
        One entry per pool; NaN where a support is.
    """
    found = []
    for layer, each in maps.items():
        sigma = each.sigma.detach().double().cpu().numpy().ravel() * each.cell(image_size)
        found.append(SupportStatistics(layer, float(sigma.mean()), *map(float, np.quantile(sigma, QUANTILES))))
    return found
