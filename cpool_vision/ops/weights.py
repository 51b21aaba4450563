"""The pooling weights `a_ij` of a strip of queries over the window they read, made in one of two ways."""
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import workspace
from .plan import (
    BY_SOFTMAX,
    TOLERANCE,
    Band,
    Geometry,
    Strip,
    axis_factor,
    iter_bands,
    reads_whole_map,
    skippable_margins,
    whole_map_bands,
)
from .reference import exponent_scale, share_out

# Beyond this spread of the logits, weights and their inverses leave the range of fp32.
MAX_LOGIT_RANGE = 60.0
# Maps of no more pixels are weighed by softmax when every query reads all of them.
SMALL_MAP = 400


class PairWeights(Protocol):
    """Weights of a call, maps and groups being one batch axis of size `maps`."""
    geometry: Geometry

    def bands(self, margins: Tensor, channels: int) -> Iterator[Band]:
        """Bands of queries that cover the output once."""

    def of(self, band: Band, strip: Strip) -> Tensor:
        """`(b, queries, rows, columns)`, summing to 1 over the window; valid until the next call."""


class SoftmaxWeights:
    """By a softmax in log space over the whole map.

    For maps so small that nothing is gained by windows, and for logits so far apart (or not finite) that their
    exponentials would leave the range of fp32.
    """

    def __init__(self, logits: Tensor, scale: Tensor, geometry: Geometry):
        self.logits, self.scale, self.geometry = logits, scale, geometry

    def bands(self, margins: Tensor, channels: int) -> Iterator[Band]:
        return whole_map_bands(*self.logits.shape, *self.scale.shape[1:])

    def of(self, band: Band, strip: Strip) -> Tensor:
        h, w = self.logits.shape[1:]
        part = (slice(band.b0, band.b1), slice(strip.r0, strip.r1))
        scale = self.scale[part][..., None]
        rows, cols = ((offsets[part] * scale).flatten(1, 2) for offsets in self.geometry)
        shape = (*rows.shape[:2], h * w)
        pairs = workspace.take('products', scale, *shape)
        torch.add(rows[..., None], cols[:, :, None], out=pairs.view(*shape[:2], h, w))
        pairs += self.logits[band.b0:band.b1].view(-1, 1, h * w)
        return torch.softmax(pairs, -1, out=workspace.take('weights', scale, *shape)).unflatten(2, (h, w))


class FactoredWeights:
    """As products of a row factor, a column factor and the pixel's weight, over certified windows."""

    def __init__(self, logits: Tensor, scale: Tensor, geometry: Geometry):
        # From the middle of their range: the smaller an exponent, the smaller its rounding.
        low, high = logits.flatten(1).aminmax(dim=1)
        self.weights = (logits - ((low + high) / 2)[:, None, None]).exp_()
        self.scale, self.geometry = scale, geometry

    def margins(self, tolerance: float) -> Tensor:
        return skippable_margins(self.weights, self.scale, self.geometry, tolerance)

    def bands(self, margins: Tensor, channels: int) -> Iterator[Band]:
        return iter_bands(margins, self.weights.shape[1], self.weights.shape[2], channels)

    def of(self, band: Band, strip: Strip) -> Tensor:
        part = (slice(band.b0, band.b1), slice(strip.r0, strip.r1), slice(band.c0, band.c1))
        scale = self.scale[part][..., None]
        weights = self.weights[band.b0:band.b1, strip.y0:strip.y1, band.x0:band.x1]
        gy = axis_factor(self.geometry.rows[part][..., strip.y0:strip.y1], scale).flatten(1, 2)
        gx = axis_factor(self.geometry.cols[part][..., band.x0:band.x1], scale).flatten(1, 2)
        total = torch.bmm(gx, weights.transpose(1, 2)).mul_(gy).sum(-1, keepdim=True)
        gy = gy / total
        out = workspace.take('weights', scale, *gy.shape, gx.shape[2])
        return torch.mul(gy[..., None], gx[:, :, None], out=out).mul_(weights[:, None])


def _needs_softmax(weight_logits: Tensor, sigma: Tensor) -> bool:
    h, w = weight_logits.shape[-2:]
    if h * w <= SMALL_MAP and reads_whole_map(sigma, h, w):
        return True
    low, high = weight_logits.flatten(2).aminmax(dim=-1)
    return not float((high.float() - low.float()).amax()) <= MAX_LOGIT_RANGE


def make_weights(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None, by_softmax: bool,
) -> PairWeights:
    """Weights in the working dtype: fp64 for fp64 features, else fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = weight_logits.to(dtype).flatten(0, 1)
    scale = share_out(exponent_scale(sigma, dtype), weight_logits.shape[1])
    geometry = Geometry.make(scale, x.shape[2:], stride, offset)
    return (SoftmaxWeights if by_softmax else FactoredWeights)(logits, scale.flatten(0, 1), geometry)


def plan_weights(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None,
) -> tuple[PairWeights, Tensor]:
    """Weights made the cheapest way that is exact, and the margins to remember: of `BY_SOFTMAX` if by softmax."""
    maps = weight_logits.shape[0] * weight_logits.shape[1]
    margins = torch.zeros(4, maps, *sigma.shape[2:], dtype=torch.int16, device=x.device)
    if _needs_softmax(weight_logits, sigma):
        return make_weights(x, weight_logits, sigma, stride, offset, True), margins.fill_(BY_SOFTMAX)
    weights = make_weights(x, weight_logits, sigma, stride, offset, False)
    if isinstance(weights, FactoredWeights) and not reads_whole_map(sigma, *x.shape[2:]):
        margins = weights.margins(TOLERANCE[x.dtype])
    return weights, margins


def recall_weights(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None, margins: Tensor,
) -> PairWeights:
    """The weights that `plan_weights` chose when it returned `margins`."""
    return make_weights(x, weight_logits, sigma, stride, offset, int(margins.flatten()[0]) == BY_SOFTMAX)
