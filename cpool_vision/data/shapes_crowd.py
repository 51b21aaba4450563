"""Renders images of several textured objects of many sizes on a cluttered background, with the class of every pixel."""
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .counter import CounterDraws
from .scene import (
    F32,
    OUTLINES,
    blend,
    canvas,
    column,
    outline_distance,
    paint,
    paint_ground,
    paint_texture,
    pair_of_colors,
    shine,
    stroke_cover,
    table,
    turn,
)

# Candidate places for every object; the one farthest from earlier objects is used.
_PLACES = 8
# Period of a texture in radii of its object, so that a closer object looks the same, magnified.
_PERIOD = (0.55, 0.8)
_LEAST_PERIOD = 1.25
_HALF = np.float32(0.5)


class Crowd(NamedTuple):
    """Images, and class and radius of the object at each pixel.

    Attributes:
        pixels: Images, `(N, size, size, 3)` uint8.
        masks: Class, `(N, size, size)` uint8, 0 for the background.
        radii: Radius of the object in pixels, `(N, size, size)` fp32, 0 for the background.
    """
    pixels: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    radii: F32


def _radius_table(mean: float, size_range: float) -> F32:
    low = mean / size_range ** 0.5
    return table(low * size_range ** ((np.arange(256) + 0.5) / 256))


def _places(draws: CounterDraws, radii: F32) -> F32:
    """Chooses centers `(N, K, 2)` of discs that are far apart, from a few random candidates."""
    n, count = radii.shape
    at = np.empty((n, count, 2), np.float32)
    for k in range(count):
        margin = np.minimum(radii[:, k] * np.float32(0.9), 15)[:, None, None]
        tries = margin + draws.uniform(2 * _PLACES).reshape(n, _PLACES, 2) * (32 - 2 * margin)
        gap = np.full((n, _PLACES), 64, np.float32)
        for other in range(k):
            offset = tries - at[:, other, None]
            distance = np.sqrt(offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1])
            gap = np.minimum(gap, distance - radii[:, other, None])
        at[:, k] = tries[np.arange(n), gap.argmax(1)]
    return at


def _period(draws: CounterDraws, radius: F32) -> F32:
    """Draws texture periods for objects of these radii."""
    return np.maximum(radius * draws.uniform(1, *_PERIOD)[:, 0], np.float32(_LEAST_PERIOD))


def _paint_clutter(draws: CounterDraws, image: F32, x: F32, y: F32, radius_of: F32, textures: int, scale: float,
                   ) -> None:
    """Paints clutter without class: texture without an outline, strokes, and an outline without texture."""
    mean, difference = pair_of_colors(draws)
    at, reach = draws.uniform(2, 2, 30), radius_of[draws.integers(1, 256)[:, 0]]
    px, py = x - column(at[:, 0]), y - column(at[:, 1])
    fade = np.clip(1 - (px * px + py * py) / column(reach * reach), 0, 1)
    px, py = turn(px, py, draws.integers(1, 256)[:, 0])
    pattern = paint_texture(px, py, draws.integers(1, textures)[:, 0], _period(draws, reach), draws.uniform(2))
    paint(image, fade * fade * np.float32(0.7), mean, pattern, difference)

    for _ in range(2):
        blend(image, stroke_cover(draws, x, y, scale), draws.uniform(3, 30, 225))

    at, radius = draws.uniform(2, 0, 32), column(radius_of[draws.integers(1, 256)[:, 0]])
    px, py = turn(x - column(at[:, 0]), y - column(at[:, 1]), draws.integers(1, 256)[:, 0])
    flat = outline_distance(px / radius, py / radius, draws.integers(1, len(OUTLINES))[:, 0])
    blend(image, np.clip(_HALF - flat * radius * np.float32(scale), 0, 1), draws.uniform(3, 50, 205))


def _paint_objects(draws: CounterDraws, image: F32, x: F32, y: F32, radii: F32, textures: int, scale: float,
                   ) -> tuple[NDArray[np.uint8], F32]:
    """Paints objects of radii `(N, K)`, largest first; returns masks and radii as in `Crowd`."""
    objects = radii.shape[1]
    kinds = draws.integers(objects, len(OUTLINES) * textures)
    places = _places(draws, radii)
    masks, sizes = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.float32)
    for k in range(objects):
        radius = radii[:, k]
        px, py = turn(x - column(places[:, k, 0]), y - column(places[:, k, 1]), draws.integers(1, 256)[:, 0])
        aspect = draws.uniform(1, 0.85, 1.0)[:, 0]
        outline, texture = kinds[:, k] // textures, kinds[:, k] % textures
        cover = outline_distance(px / column(radius), py / column(radius * aspect), outline)
        cover = np.clip(_HALF - cover * column(radius) * np.float32(scale), 0, 1)
        tx, ty = turn(px, py, draws.integers(1, 256)[:, 0])
        mean, difference = pair_of_colors(draws)
        paint(image, cover, mean, paint_texture(tx, ty, texture, _period(draws, radius), draws.uniform(2)), difference)
        inside = cover > _HALF
        masks = np.where(inside, column(kinds[:, k] + 1).astype(np.uint8), masks)
        sizes = np.where(inside, column(radius) * np.float32(scale), sizes)
    return masks, sizes


def render_crowds(
        seed: int,
        stream: int,
        indices: NDArray[Any],
        size: int = 64,
        mean_radius: float = 8.0,
        size_range: float = 4.0,
        objects: int = 4,
        textures: int = 3,
) -> Crowd:
    """Renders one image per index; scenes are the same at every `size`, up to pixel noise.

    Every object has a class (outline times texture) and a radius with a uniform logarithm. Smaller objects are in front
    of larger ones. The period of a texture grows with its object. Clutter does not depend on the class: a flat object,
    a patch of texture without an outline, line strokes, colors, light and noise.

    Args:
        seed: Seed of the dataset.
        stream: Number of the split.
        indices: Indices of the samples, `(N,)`.
        size: Side in pixels.
        mean_radius: Geometric mean of the smallest and the largest radius, in 64ths of the side.
        size_range: Largest radius relative to the smallest; 1 gives objects of equal size.
        objects: Number of objects per image.
        textures: Number of `TEXTURES` that form classes.
    """
    n = len(indices)
    draws = CounterDraws(seed, stream, indices)
    scale = size / 32
    x, y = canvas(n, size)
    image = paint_ground(draws, n, size)
    radius_of = _radius_table(mean_radius / 2, size_range)
    _paint_clutter(draws, image, x, y, radius_of, textures, scale)
    radii = -np.sort(-radius_of[draws.integers(objects, 256)], axis=1)
    masks, sizes = _paint_objects(draws, image, x, y, radii, textures, scale)
    blend(image, stroke_cover(draws, x, y, scale), draws.uniform(3, 30, 225))
    return Crowd(shine(draws, image, x, y), masks, sizes)
