"""How far each context pool of a model looks: mean, quantiles and histogram of its supports for a batch of images."""
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def layer_supports(maps: ContextMaps, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """All supports of one context pool, over images, groups and output cells: 1-D, fp64, in pixels of the image."""
    return maps.sigma.detach().double().cpu().numpy().ravel() * maps.cell(image_size)


def support_statistics(maps: Mapping[str, ContextMaps], image_size: tuple[int, int]) -> list[SupportStatistics]:
    """Statistics of the supports of each pool, in order of execution.

    Args:
        maps: result of `context_maps`.
        image_size: (height, width) of the images.

    Returns:
        One entry per pool; NaN if a support is NaN.
    """
    found = []
    for layer, each in maps.items():
        sigma = layer_supports(each, image_size)
        found.append(SupportStatistics(layer, float(sigma.mean()), *map(float, np.quantile(sigma, QUANTILES))))
    return found


class SupportHistogram(NamedTuple):
    """Shares of the supports of each layer that fall into common bins.

    Attributes:
        layers: L names of context pools, in order of execution.
        edges: `(N + 1,)` fp64, in pixels of the image.
        shares: `(L, N)` fp64; each row sums to one.
    """

    layers: list[str]
    edges: NDArray[np.float64]
    shares: NDArray[np.float64]


def support_histogram(
        maps: Mapping[str, ContextMaps], image_size: tuple[int, int], bins: int = 32,
) -> SupportHistogram:
    """Histogram of the supports of every context pool by depth, over images, groups and output cells.

    Args:
        maps: result of `context_maps`.
        image_size: (height, width) of the images.
        bins: number of equal bins from 0 to the largest support of all layers.

    Raises:
        ValueError: no layers, `bins` below 1, or a support that is not finite.
    """
    if bins < 1:
        raise ValueError(f'bins must be >= 1, got {bins}')
    if not maps:
        raise ValueError('maps must hold at least one context pool, got none')
    supports = {name: layer_supports(each, image_size) for name, each in maps.items()}
    for name, values in supports.items():
        if not len(values) or not np.isfinite(values).all():
            raise ValueError(f'supports of {name!r} are not finite, or there are none: check weights and images')
    edges = np.linspace(0, max(values.max() for values in supports.values()), bins + 1)
    shares = np.stack([np.histogram(values, edges)[0] / len(values) for values in supports.values()])
    return SupportHistogram(list(supports), edges, shares)
