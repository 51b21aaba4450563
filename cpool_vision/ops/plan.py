"""Which pixels each query must read: certified windows, and the bands and strips of queries that share them.

A query pools over the whole map, but all but a tolerated share of its weight lies in a rectangle around it. The
Gaussian factorizes over rows and columns, so the exact weight outside a range of rows (or columns) costs one
multiplication per query and pixel, `1 / C` of the pooling itself. Windows therefore follow the supports *and* the
pooling weights that were learned, and the share left out is computed, not estimated.
"""
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import offset_tables, squared_offsets

# Largest share of a query's total weight that may be left out, by the dtype of the features.
TOLERANCE = {
    torch.float64: 2.0 ** -46,
    torch.float32: 2.0 ** -20,
    torch.float16: 2.0 ** -20,
    torch.bfloat16: 2.0 ** -20,
}
# exp() of less is subnormal, hence slow, and too small for any tolerance.
MIN_EXPONENT = -80.0
# Replaces margins where queries are weighed by softmax over the whole map.
BY_SOFTMAX = -1
# Columns of a band and rows of a strip that are considered; 0 stands for the whole width.
SHAPES = ((14, 7), (14, 14), (28, 7), (0, 4), (0, 7))
# Cost of touching one element, and of launching the operators of a strip, in multiply-adds of a matrix product.
ELEMENT_COST = 8.0
STRIP_COST = 2e7
# Weights of one window: few enough to stay in the last-level cache.
CHUNK_ELEMENTS = 600_000


class Strip(NamedTuple):
    """Query rows `r0:r1` of a band; none of them reads outside rows `y0:y1`."""
    r0: int
    r1: int
    y0: int
    y1: int


class Band(NamedTuple):
    """Query columns `c0:c1` of maps `b0:b1`; none of them reads outside columns `x0:x1`."""
    b0: int
    b1: int
    c0: int
    c1: int
    x0: int
    x1: int
    strips: tuple[Strip, ...]


class Geometry(NamedTuple):
    """Squared offsets of both axes, `(maps, Ho, Wo, H)` and `(maps, Ho, Wo, W)`, zero at each query's nearest pixel."""
    rows: Tensor
    cols: Tensor

    @classmethod
    def make(cls, scale: Tensor, in_size: Sequence[int], stride: int, offset: Tensor | None) -> 'Geometry':
        """For maps whose `scale` is `(B, G, Ho, Wo)`; tables that queries share are expanded, not repeated."""
        b, g, ho, wo = scale.shape
        h, w = in_size
        if offset is None:
            rows, cols = (
                squared_offsets(*sizes, stride, scale.dtype, scale.device) for sizes in ((ho, h), (wo, w)))
            rows = rows[:, None]
        else:
            tables = offset_tables(offset.to(scale.dtype), (ho, wo), in_size, stride)
            rows, cols = (t.expand(b, -1, -1, -1, -1).flatten(0, 1) for t in tables)
        return cls(rows.expand(b * g, ho, wo, h), cols.expand(b * g, ho, wo, w))


def axis_factor(offsets: Tensor, scale: Tensor) -> Tensor:
    """One axis of the Gaussian: `exp(offsets * scale)`, with `scale` of `exponent_scale`; zero below MIN_EXPONENT."""
    return torch.threshold_(offsets * scale, MIN_EXPONENT, -math.inf).exp_()


def reads_whole_map(sigma: Tensor, height: int, width: int) -> bool:
    """Whether the largest support spans the map from anywhere, so that looking for windows cannot pay."""
    reach = SHAPES[0][1] + 8 * float(sigma.amax())
    return not reach < max(height, width)


def skippable_margins(weights: Tensor, scale: Tensor, geometry: Geometry, tolerance: float) -> Tensor:
    """Rows and columns that each query may skip at every side of the map.

    Each side may hold a quarter of `tolerance`, measured against the query's total weight.

    Args:
        weights: `(B, H, W)`, `exp(weight_logits)` up to a factor per map.
        scale: `(B, Ho, Wo)`, `-1 / (2 sigma^2)`.
        geometry: offsets of both axes.
        tolerance: share of the total weight that may be left out.

    Returns:
        int16 `(4, B, Ho, Wo)`: rows at the top and bottom, columns at the left and right.
    """
    b, ho, wo = scale.shape
    h, w = weights.shape[1:]
    margins = torch.empty(4, b, ho, wo, dtype=torch.int16, device=weights.device)
    # A product with these sums a mass from the head, or from the tail, and leaves it ascending.
    from_head = [torch.ones(n, n, dtype=weights.dtype, device=weights.device).triu_() for n in (h, w)]
    cumulate = (from_head[0], from_head[0].flip(0), from_head[1], from_head[1].flip(0))
    rows = max(1, CHUNK_ELEMENTS // (2 * b * wo * (h + w)))
    for r0 in range(0, ho, rows):
        r1 = min(r0 + rows, ho)
        part = scale[:, r0:r1, :, None]
        gy = axis_factor(geometry.rows[:, r0:r1], part).flatten(1, 2)
        gx = axis_factor(geometry.cols[:, r0:r1], part).flatten(1, 2)
        mass_y = torch.bmm(gx, weights.transpose(1, 2)).mul_(gy)
        mass_x = torch.bmm(gy, weights).mul_(gx)
        limit = mass_y.sum(-1, keepdim=True).mul_(tolerance / 4)
        for k, mass in enumerate((mass_y, mass_y, mass_x, mass_x)):
            skipped = torch.searchsorted(mass @ cumulate[k], limit, right=True, out_int32=True)
            margins[k, :, r0:r1] = skipped.view(b, r1 - r0, wo)
    return margins


def _maps_per_chunk(maps: int, elements: float) -> int:
    """Maps that share a window of so many weights each, in chunks of even size."""
    chunks = math.ceil(maps / max(1, min(maps, int(CHUNK_ELEMENTS / elements))))
    return math.ceil(maps / chunks)


def _choose_shape(margins: Tensor, height: int, width: int, channels: int) -> tuple[int, int, float]:
    """Columns of a band, rows of a strip, and the mean window area, at the least modeled cost."""
    maps, ho, wo = margins.shape[1:]
    skip = -margins.float()
    best = (float('inf'), 0, 0, 0.0)
    for cols, rows in SHAPES:
        cols, rows = min(cols or wo, wo), min(rows, ho)
        x = -F.max_pool2d(skip[2:], (ho, cols), ceil_mode=True)
        y = -F.max_pool2d(skip[:2], (rows, cols), ceil_mode=True)
        read_cols = width - x[0] - x[1]
        area = (height - y[0] - y[1]) * read_cols
        strips = area.numel() / maps * math.ceil(maps / _maps_per_chunk(maps, rows * cols * float(area.mean())))
        # Three products and four passes over the weights; seven passes over the features of a band.
        cost = float(area.sum()) * rows * cols * (3 * channels + 4 * ELEMENT_COST)
        cost += float(read_cols.sum()) * height * channels * 7 * ELEMENT_COST + strips * STRIP_COST
        best = min(best, (cost, cols, rows, float(area.mean())))
    return best[1:]


def whole_map_bands(maps: int, height: int, width: int, out_height: int, out_width: int) -> Iterator[Band]:
    """Bands in which every query reads the whole map."""
    rows = max(1, min(out_height, CHUNK_ELEMENTS // (out_width * height * width)))
    step = _maps_per_chunk(maps, rows * out_width * height * width)
    for b0 in range(0, maps, step):
        strips = (Strip(r0, min(r0 + rows, out_height), 0, height) for r0 in range(0, out_height, rows))
        yield Band(b0, min(b0 + step, maps), 0, out_width, 0, width, tuple(strips))


def iter_bands(margins: Tensor, height: int, width: int, channels: int) -> Iterator[Band]:
    """Bands that cover every query once.

    Args:
        margins: `(4, B, Ho, Wo)` of `skippable_margins`.
        height: H.
        width: W.
        channels: channels of a map.
    """
    maps, ho, wo = margins.shape[1:]
    cols, rows, area = _choose_shape(margins, height, width, channels)
    step = _maps_per_chunk(maps, rows * cols * area)
    for b0 in range(0, maps, step):
        b1 = min(b0 + step, maps)
        for c0 in range(0, wo, cols):
            c1 = min(c0 + cols, wo)
            skip = margins[:, b0:b1, :, c0:c1].amin((1, 3))
            left, right = skip[2:].amin(1).tolist()
            top, bottom = skip[:2].tolist()
            strips = []
            for r0 in range(0, ho, rows):
                r1 = min(r0 + rows, ho)
                strips.append(Strip(r0, r1, min(top[r0:r1]), height - min(bottom[r0:r1])))
            yield Band(b0, b1, c0, c1, left, width - right, tuple(strips))
