"""Renders images of a textured object on a cluttered background, bit-identical on all platforms."""
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counter import CounterDraws

OUTLINES = ('disk', 'triangle')
TEXTURES = ('striped', 'checked', 'dotted', 'zigzag', 'ringed')
# lengths are in units of 1/32 of the image's side
RADIUS = (4.0, 16.5)
PERIOD = (4.0, 6.5)

F32 = NDArray[np.float32]
_HALF = np.float32(0.5)


def table(values: NDArray[np.float64]) -> F32:
    """Rounds to fp32 values that are the same on every platform, whatever the last digits of its libm."""
    return (np.round(values * 2 ** 20) / 2 ** 20).astype(np.float32)


_ANGLES = np.arange(256) * (2 * np.pi / 256)
_COS, _SIN = table(np.cos(_ANGLES)), table(np.sin(_ANGLES))
_RADII = table(RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** ((np.arange(256) + 0.5) / 256))


def column(x: NDArray[Any]) -> NDArray[Any]:
    """Reshapes `(n,)` to `(n, 1, 1)`, to broadcast over pixels."""
    return x[:, None, None]


def turn(x: F32, y: F32, direction: NDArray[np.int64]) -> tuple[F32, F32]:
    """Rotates coordinates by `direction` 256ths of a circle."""
    c, s = column(_COS[direction]), column(_SIN[direction])
    return x * c + y * s, y * c - x * s


def outline_distance(x: F32, y: F32, outline: NDArray[np.int64]) -> F32:
    """Returns the distance to the outline in radii, negative inside; `x`, `y` are relative to the center, in radii."""
    lean = np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * y
    shapes = np.sqrt(x * x + y * y) - np.float32(0.95), np.maximum(y, lean) - np.float32(0.65)
    return np.choose(column(outline), shapes)


def _triangle_wave(t: F32) -> F32:
    """Returns a triangle wave of period 1 between -1 and 1."""
    return 4 * np.abs(t - np.floor(t) - np.float32(0.5)) - 1


def paint_texture(x: F32, y: F32, texture: NDArray[np.int64], period: F32, phase: F32) -> F32:
    """Returns a pattern in [-1, 1]; textures have the same period and slopes. `x`, `y` are relative to the center."""
    u = x / column(period) + column(phase[:, 0])
    v = y / column(period) + column(phase[:, 1])
    first = np.clip(2 * _triangle_wave(u), -1, 1)
    second = np.clip(2 * _triangle_wave(v), -1, 1)
    bent = np.clip(2 * _triangle_wave(u + np.float32(0.45) * _triangle_wave(v / 2)), -1, 1)
    rings = np.clip(2 * _triangle_wave(np.sqrt(x * x + y * y) / column(period) + column(phase[:, 0])), -1, 1)
    return np.choose(column(texture), (first, first * second, np.minimum(first, second), bent, rings))


def _value_noise(draws: CounterDraws, n: int, cells: int, size: int) -> F32:
    """Returns smooth noise in [-1, 1): random values on a grid with `cells` cells per side, interpolated bilinearly."""
    grid = draws.uniform((cells + 1) ** 2, -1, 1).reshape(n, cells + 1, cells + 1)
    at = ((np.arange(size) + 0.5) * (cells / size)).astype(np.float32)
    low = np.floor(at).astype(np.int64)
    frac = at - low.astype(np.float32)
    rows = grid[:, low] + (grid[:, low + 1] - grid[:, low]) * frac[None, :, None]
    return rows[:, :, low] + (rows[:, :, low + 1] - rows[:, :, low]) * frac


def blend(image: F32, cover: F32, color: F32) -> None:
    """Blends a color `(n, 3)` into the image, in place, with coverage `(n, size, size)`."""
    for c in range(3):
        image[:, c] += cover * (column(color[:, c]) - image[:, c])


def stroke_cover(draws: CounterDraws, x: F32, y: F32, scale: float) -> F32:
    """Returns the coverage of a random thin line segment per image."""
    ends = draws.uniform(4, -4, 36)
    width = column(draws.uniform(1, 0.3, 0.8)[:, 0])
    px, py = x - column(ends[:, 0]), y - column(ends[:, 1])
    dx, dy = column(ends[:, 2] - ends[:, 0]), column(ends[:, 3] - ends[:, 1])
    along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + np.float32(1e-3)), 0, 1)
    px, py = px - along * dx, py - along * dy
    return np.clip(np.float32(0.5) - (np.sqrt(px * px + py * py) - width) * np.float32(scale), 0, 1)


def pair_of_colors(draws: CounterDraws) -> tuple[F32, F32]:
    """Draws a mean color, and a difference of random hue and sign, both `(N, 3)` in 0 to 255."""
    mean = draws.uniform(3, 70, 185)
    contrast = draws.uniform(1, 32, 68) * np.where(draws.uniform(1) < 0.5, np.float32(-1), np.float32(1))
    return mean, contrast * draws.uniform(3, 0.6, 1.0)


def paint(image: F32, cover: F32, mean: F32, pattern: F32, difference: F32) -> None:
    """Blends a pattern in [-1, 1] around a mean color into the image, in place, with coverage `(n, size, size)`."""
    for c in range(3):
        target = column(mean[:, c]) + pattern * column(difference[:, c])
        image[:, c] += cover * (target - image[:, c])


def canvas(n: int, size: int) -> tuple[F32, F32]:
    """Returns the x and y coordinates of the pixel centers, from 0 to 32 over the image, `(n, size, size)`."""
    center = ((np.arange(size) + 0.5) / (size / 32)).astype(np.float32)
    shape = n, size, size
    return np.broadcast_to(center[None, None, :], shape), np.broadcast_to(center[None, :, None], shape)


def paint_ground(draws: CounterDraws, n: int, size: int) -> F32:
    """Returns smooth color noise, `(n, 3, size, size)` in 0 to 255."""
    ground = draws.uniform(3, 60, 195)
    coarse = [_value_noise(draws, n, 3, size) for _ in range(2)]
    fine = _value_noise(draws, n, 10, size)
    tint = draws.uniform(9, -1, 1).reshape(n, 3, 3) * np.asarray([34, 34, 22], np.float32)
    image = np.empty((n, 3, size, size), np.float32)
    for c in range(3):
        image[:, c] = column(ground[:, c]) + column(tint[:, c, 0]) * coarse[0] + column(tint[:, c, 1]) * coarse[1]
        image[:, c] += column(tint[:, c, 2]) * fine
    return image


def shine(draws: CounterDraws, image: F32, x: F32, y: F32) -> NDArray[np.uint8]:
    """Adds light from one side and pixel noise; returns `(n, size, size, 3)` uint8."""
    n, size, middle = len(image), image.shape[-1], np.float32(16)
    along, _ = turn((x - middle) / middle, (y - middle) / middle, draws.integers(1, 256)[:, 0])
    light = column(draws.uniform(1, 0.8, 1.1)[:, 0]) * (1 + column(draws.uniform(1, 0, 0.35)[:, 0]) * along)
    image *= light[:, None]
    noise = draws.bytes(6 * size * size).astype(np.float32).reshape(n, 2, 3, size, size)
    noise_level = draws.uniform(1, 0.02, 0.10)[:, 0]
    image += (noise[:, 0] - noise[:, 1]) * noise_level[:, None, None, None]
    return np.floor(np.clip(image, 0, 255) + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1)


def render_scenes(
        seed: int,
        stream: int,
        indices: NDArray[Any],
        outline: NDArray[np.int64],
        texture: NDArray[np.int64],
        size: int = 32,
) -> NDArray[np.uint8]:
    """Renders one image per index.

    Each image shows an object of the given outline and texture, with random position, size (the largest is over 4 times
    the smallest), orientation, period, colors and aspect ratio, on smooth color noise. Clutter does not depend on the
    class: an untextured object with a random outline, a patch of texture without an outline, line strokes behind and in
    front of the object, the direction of the light, and pixel noise.

    Args:
        seed: Seed of the dataset.
        stream: Number of the split.
        indices: Indices of the samples, `(N,)`.
        outline: Indices into `OUTLINES`, `(N,)`.
        texture: Indices into `TEXTURES`, `(N,)`.
        size: Side in pixels. Scenes are the same at every size, up to pixel noise.

    Returns:
        `(N, size, size, 3)` uint8.
    """
    n = len(indices)
    draws = CounterDraws(seed, stream, indices)
    scale = size / 32
    x, y = canvas(n, size)
    image = paint_ground(draws, n, size)
    _paint_clutter(draws, image, x, y, scale)
    radius = _RADII[draws.integers(1, 256)[:, 0]]
    margin = np.minimum(radius * np.float32(0.9), 15)
    at = margin[:, None] + draws.uniform(2) * (32 - 2 * margin[:, None])
    px, py = turn(x - column(at[:, 0]), y - column(at[:, 1]), draws.integers(1, 256)[:, 0])
    aspect = draws.uniform(1, 0.85, 1.0)[:, 0]
    ux, uy = px / column(radius), py / column(radius * aspect)
    cover = outline_distance(ux, uy, outline) * column(radius) * np.float32(scale)
    cover = np.clip(_HALF - cover, 0, 1)
    tx, ty = turn(px, py, draws.integers(1, 256)[:, 0])
    mean, difference = pair_of_colors(draws)
    pattern = paint_texture(tx, ty, texture, draws.uniform(1, *PERIOD)[:, 0], draws.uniform(2))
    paint(image, cover, mean, pattern, difference)
    blend(image, stroke_cover(draws, x, y, scale), draws.uniform(3, 30, 225))
    return shine(draws, image, x, y)


def _paint_clutter(draws: CounterDraws, image: F32, x: F32, y: F32, scale: float) -> None:
    """Paints clutter without class: texture without an outline, strokes, and an outline without texture."""
    mean, difference = pair_of_colors(draws)
    at, reach = draws.uniform(2, 2, 30), draws.uniform(1, 3, 7)[:, 0]
    px, py = x - column(at[:, 0]), y - column(at[:, 1])
    fade = np.clip(1 - (px * px + py * py) / column(reach * reach), 0, 1)
    px, py = turn(px, py, draws.integers(1, 256)[:, 0])
    kind, period = draws.integers(1, len(TEXTURES))[:, 0], draws.uniform(1, *PERIOD)[:, 0]
    pattern = paint_texture(px, py, kind, period, draws.uniform(2))
    paint(image, fade * fade * np.float32(0.7), mean, pattern, difference)

    for _ in range(2):
        blend(image, stroke_cover(draws, x, y, scale), draws.uniform(3, 30, 225))

    at, radius = draws.uniform(2, 0, 32), column(draws.uniform(1, 2.5, 5.5)[:, 0])
    px, py = turn(x - column(at[:, 0]), y - column(at[:, 1]), draws.integers(1, 256)[:, 0])
    flat = outline_distance(px / radius, py / radius, draws.integers(1, len(OUTLINES))[:, 0])
    blend(image, np.clip(_HALF - flat * radius * np.float32(scale), 0, 1), draws.uniform(3, 50, 205))
