"""Footprints: the pixels that an output cell of a context pool reads, and their weights."""
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.reference import squared_offsets
from .maps import ContextMaps, context_maps


class Footprints(NamedTuple):
    """Pooling weights of chosen output cells of one context pool.

    Attributes:
        weights: `(B, G, P, H, W)`, fp32 or fp64: weight of every pixel of the pooled map in each of P output cells.
        cells: (row, column) of each output cell.
        sigma: `(B, G, P)`, supports of the cells in pixels of the pooled map, in the dtype of `weights`.
        grid: `(H, W)` of the pooled map.
        stride: Output cells are `stride` pixels apart.
    """

    weights: Tensor
    cells: list[tuple[int, int]]
    sigma: Tensor
    grid: tuple[int, int]
    stride: int

    def centers(self) -> Tensor:
        """Returns the centers of the output cells in pixels of the pooled map, `(P, 2)` fp64; pixel 0 spans [0, 1]."""
        return (torch.tensor(self.cells, dtype=torch.float64).view(-1, 2) + 0.5) * self.stride

    def reach(self) -> Tensor:
        """Returns the weighted root mean square distance from the cell's center, per axis, `(B, G, P)`, in map pixels.

        With equal pooling weights and without borders it equals sigma.
        """
        height, width = self.grid
        centers = self.centers().to(self.weights)
        rows = torch.arange(height).to(self.weights) + 0.5
        columns = torch.arange(width).to(self.weights) + 0.5
        squares = (rows - centers[:, :1]).square()[:, :, None] + (columns - centers[:, 1:]).square()[:, None]
        return ((self.weights * squares).sum((-2, -1)) / 2).sqrt()


def grid_points(image_size: tuple[int, int], side: int = 3) -> list[tuple[float, float]]:
    """Returns `side` x `side` evenly spaced points (y, x) in an image, in pixels, row by row."""
    height, width = image_size
    return [((i + 0.5) * height / side, (j + 0.5) * width / side) for i in range(side) for j in range(side)]


def cells_at(
        maps: ContextMaps, image_size: tuple[int, int], points: Sequence[Sequence[float]],
) -> list[tuple[int, int]]:
    """Returns the output cells (row, column) of a context pool that contain the given points.

    Args:
        maps: Maps of the context pool.
        image_size: (height, width) of the images.
        points: Points (y, x) in pixels of the image; the first pixel spans [0, 1].

    Raises:
        ValueError: There are no points, or a point is not a pair of numbers inside the image.
    """
    if not len(points):
        raise ValueError('points must contain at least one (y, x), got none')
    cells = []
    for point in points:
        if len(point) != 2 or not all(0 <= value < size for value, size in zip(point, image_size, strict=True)):
            raise ValueError(f'point {tuple(point)} is not inside an image of {image_size[0]} x {image_size[1]} '
                             'pixels (height x width): choose 0 <= y < height and 0 <= x < width')
        pixel = (value * extent / size for value, extent, size in zip(point, maps.grid, image_size, strict=True))
        row, column = (math.floor(value / maps.stride) for value in pixel)
        cells.append((row, column))
    return cells


def footprints_of(
        maps: ContextMaps, image_size: tuple[int, int], points: Sequence[Sequence[float]], name: str = 'the pool',
) -> Footprints:
    """Computes the `gaussian_footprints` of one context pool from its maps.

    Args:
        maps: Maps of the context pool.
        image_size: (height, width) of the images.
        points: Points (y, x) in pixels of the image.
        name: Name of the pool, for messages.

    Raises:
        ValueError: A point is outside the image, or the pool reads windows.
    """
    if maps.windows != 1:
        raise ValueError(f'{name!r} pools {maps.windows} windows of an image, so a point has no single cell: '
                         'choose layers that pool whole maps')
    cells = cells_at(maps, image_size, points)
    dtype = torch.promote_types(maps.sigma.dtype, torch.float32)
    sigma = maps.sigma.detach().to(dtype)
    (rows, columns), (height, width) = zip(*cells, strict=True), maps.grid
    chosen = sigma[:, :, list(rows), list(columns)]
    # as in ops.reference, but only for these rows of the weight matrix
    dy = squared_offsets(sigma.shape[2], height, maps.stride, dtype, sigma.device)[list(rows)]
    dx = squared_offsets(sigma.shape[3], width, maps.stride, dtype, sigma.device)[list(columns)]
    distance = (dy[:, :, None] + dx[:, None, :]).flatten(1)
    logits = maps.weight_logits.detach().to(dtype).flatten(2)[:, :, None]
    weights = (logits - distance / (2 * chosen.square()[..., None])).softmax(-1)
    return Footprints(weights.unflatten(-1, (height, width)), cells, chosen, maps.grid, maps.stride)


def gaussian_footprints(
        model: nn.Module, images: Tensor, points: Sequence[Sequence[float]], layers: Sequence[str] | None = None,
) -> dict[str, Footprints]:
    """Computes the pooling weights of the output cells at given points, for every context pool.

    These are the weights of the operator, `softmax_j(l_j - |p_i - p_j|^2 / (2 sigma_i^2))` over all pixels j. They sum
    to one, and the pool's output at the cell is the mean of its input with these weights. They do not include the gate
    of a pool with `init='identity'`, which blends the output with the input.

    Args:
        model: An eager model with context pools, see `context_maps`.
        images: Input of the model, `(B, C, H, W)`, on its device.
        points: Points (y, x) in pixels of the images; the first pixel spans [0, 1].
        layers: Names of the pools; all if None.

    Returns:
        Footprints by name of the pool, in order of execution.

    Raises:
        ValueError: The model has no context pool, or none with a requested name; a point is outside the images; or a
            requested pool reads windows instead of whole maps.
    """
    maps = context_maps(model, images)
    size = images.shape[-2], images.shape[-1]
    return {name: footprints_of(each, size, points, name) for name, each in chosen_layers(maps, layers).items()}


def chosen_layers(maps: Mapping[str, ContextMaps], layers: Sequence[str] | None) -> dict[str, ContextMaps]:
    """Returns the maps of the named layers, or all if `layers` is None.

    Raises:
        ValueError: There is no layer of a given name.
    """
    for name in layers or ():
        if name not in maps:
            raise ValueError(f'no context pool is named {name!r}: choose from {", ".join(maps)}')
    return {name: each for name, each in maps.items() if layers is None or name in layers}
