"""Statistics of the supports of a model's context pools for a batch of images: mean, quantiles and histograms."""
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .maps import ContextMaps

QUANTILES = (0.05, 0.5, 0.95)


class SupportStatistics(NamedTuple):
    """Supports of one context pool over images, output cells and groups, in pixels of the image.

    Attributes:
        layer: Name of the pool in the model.
        mean: Mean support.
        q05, q50, q95: Quantiles of the supports.
    """

    layer: str
    mean: float
    q05: float
    q50: float
    q95: float


def layer_supports(maps: ContextMaps, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Returns all supports of a context pool, over images, groups and cells: 1-D, fp64, in pixels of the image."""
    return maps.sigma.detach().double().cpu().numpy().ravel() * maps.cell(image_size)


def support_statistics(maps: Mapping[str, ContextMaps], image_size: tuple[int, int]) -> list[SupportStatistics]:
    """Computes mean and quantiles of the supports of each context pool.

    Args:
        maps: Result of `context_maps`.
        image_size: (height, width) of the images.

    Returns:
        An entry per pool, in order of execution; NaN if a support is NaN.
    """
    found = []
    for layer, each in maps.items():
        sigma = layer_supports(each, image_size)
        found.append(SupportStatistics(layer, float(sigma.mean()), *map(float, np.quantile(sigma, QUANTILES))))
    return found


class SupportHistogram(NamedTuple):
    """Histograms of the supports of all context pools, with common bins.

    Attributes:
        layers: Names of the L context pools, in order of execution.
        edges: Edges of the bins, `(N + 1,)` fp64, in pixels of the image.
        shares: Fraction of each pool's supports in each bin, `(L, N)` fp64; each row sums to one.
    """

    layers: list[str]
    edges: NDArray[np.float64]
    shares: NDArray[np.float64]


def support_histogram(
        maps: Mapping[str, ContextMaps], image_size: tuple[int, int], bins: int = 32,
) -> SupportHistogram:
    """Computes a histogram of the supports of every context pool, over images, groups and output cells.

    Args:
        maps: Result of `context_maps`.
        image_size: (height, width) of the images.
        bins: Number of equal bins from 0 to the largest support of all pools.

    Raises:
        ValueError: There are no pools, `bins` is below 1, or a support is NaN or infinite.
    """
    if bins < 1:
        raise ValueError(f'bins must be >= 1, got {bins}')
    if not maps:
        raise ValueError('maps must contain at least one context pool, got none')
    supports = {name: layer_supports(each, image_size) for name, each in maps.items()}
    for name, values in supports.items():
        if not len(values) or not np.isfinite(values).all():
            raise ValueError(f'supports of {name!r} are empty, NaN or infinite: check weights and images')
    edges = np.linspace(0, max(values.max() for values in supports.values()), bins + 1)
    shares = np.stack([np.histogram(values, edges)[0] / len(values) for values in supports.values()])
    return SupportHistogram(list(supports), edges, shares)
