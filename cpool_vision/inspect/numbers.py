"""Data of the figures as plain values, for JSON."""
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
    """Converts a tensor to nested lists, rounded to the precision of fp32."""
    return [_plain(each) if each.ndim else float(f'{each.item():.7g}') for each in values.detach().double().cpu()]


def layer_numbers(maps: Mapping[str, ContextMaps], image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Returns grid, statistics and limits of the supports, and effective pixels of each context pool.

    Supports are in pixels of the image. `effective_pixels` measures how unequal the pooling weights are: the number of
    equally weighted pixels with the same entropy, relative to all pixels of the map, averaged over images and groups.
    It is 1 if all pixels have the same weight.
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
    """Returns `support_histogram` as lists: edges in pixels, and shares by layer."""
    found = support_histogram(maps, image_size, bins)
    return {'edges_px': found.edges.tolist(), 'shares': dict(zip(found.layers, found.shares.tolist(), strict=True))}


def footprint_numbers(
        footprints: Mapping[str, Footprints], image_size: tuple[int, int], points: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Returns support, reach (see `Footprints.reach`) and largest weight by layer, each `[image][group][point]`.

    Supports and reach are in pixels of the image.
    """
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
    """Returns unit, grid, and the center and the 50 % and 90 % radii of the fields with pools off and on."""
    numbers: dict[str, Any] = {'unit': list(after.unit), 'grid': list(after.grid)}
    for name, field in (('pools_off', before), ('pools_as_they_are', after)):
        numbers[name] = {
            'center_px': list(field.center),
            'radius_50_px': field.radius(0.5),
            'radius_90_px': field.radius(0.9),
        }
    return numbers
