"""The numbers behind the figures, as plain values for JSON."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .footprints import Footprints
from .maps import ContextMaps
from .receptive_field import ReceptiveField
from .supports import QUANTILES, layer_supports, support_histogram


def _plain(values: Tensor) -> list[Any]:
    """Nested lists with as many digits as fp32 holds."""
    return [_plain(each) if each.ndim else float(f'{each.item():.7g}') for each in values.detach().double().cpu()]


def layer_numbers(maps: Mapping[str, ContextMaps], image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Per context pool: its grid, the statistics and limits of its supports, and how unequal its weights are.

    Supports are in pixels of the image. `effective_pixels` is the share of the map's pixels that equally weighted ones
    would need for the same entropy of the pooling weights, mean over images and groups: 1 where all count alike.
    """
    numbers = []
    for name, each in maps.items():
        cell = each.cell(image_size)
        supports = layer_supports(each, image_size)
        q05, q50, q95 = map(float, np.quantile(supports, QUANTILES))
        log_weight = each.weight_logits.detach().double().flatten(2).log_softmax(-1)
        entropy = -(log_weight.exp() * log_weight).sum(-1)
        numbers.append({
            'layer': name,
            'grid': list(each.grid),
            'windows': each.windows,
            'stride': each.stride,
            'groups': each.sigma.shape[1],
            'gate': each.gate,
            'cell_px': cell,
            'mean_px': float(supports.mean()),
            'q05_px': q05,
            'q50_px': q50,
            'q95_px': q95,
            'limits_px': None if each.limits is None else [limit * cell for limit in each.limits],
            'effective_pixels': float(entropy.exp().mean()) / (each.grid[0] * each.grid[1]),
        })
    return numbers


def histogram_numbers(maps: Mapping[str, ContextMaps], image_size: tuple[int, int], bins: int = 32) -> dict[str, Any]:
    """`support_histogram` as lists: edges in pixels, shares by layer."""
    found = support_histogram(maps, image_size, bins)
    return {'edges_px': found.edges.tolist(), 'shares': dict(zip(found.layers, found.shares.tolist(), strict=True))}


def footprint_numbers(
        footprints: Mapping[str, Footprints], image_size: tuple[int, int], points: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Per layer, `[image][group][point]`: support and reach (see `Footprints.reach`) in pixels, and largest weight."""
    layers = {}
    for name, found in footprints.items():
        cell = math.sqrt(image_size[0] * image_size[1] / (found.grid[0] * found.grid[1]))
        layers[name] = {
            'cells': [list(each) for each in found.cells],
            'sigma_px': _plain(found.sigma * cell),
            'reach_px': _plain(found.reach() * cell),
            'largest_weight': _plain(found.weights.amax((-2, -1))),
        }
    return {'points_px': [[float(value) for value in point] for point in points], 'layers': layers}


def receptive_field_numbers(before: ReceptiveField, after: ReceptiveField) -> dict[str, Any]:
    """Unit and grid, and with pools off and as they are the center and the radii that hold 50 and 90 % of the field."""
    numbers: dict[str, Any] = {'unit': list(after.unit), 'grid': list(after.grid)}
    for name, field in (('pools_off', before), ('pools_as_they_are', after)):
        numbers[name] = {
            'center_px': list(field.center),
            'radius_50_px': field.radius(0.5),
            'radius_90_px': field.radius(0.9),
        }
    return numbers
