"""Exact context pooling in memory linear in the number of pixels: strips of queries, each reading a certified window.

Within a window the weights are an outer product of a row and a column factor, so they cost two exponentials per query,
row and column, one multiplication per pair, and matrix products. The backward pass rebuilds them from the supports.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from . import workspace
from .layout import accumulate_matmul, empty_maps, is_channels_last, join_groups, matmul
from .plan import (
    CHUNK_ELEMENTS,
    TOLERANCE,
    Band,
    Geometry,
    Strip,
    axis_factor,
    exponent_scale,
    iter_bands,
    reads_whole_map,
    skippable_margins,
)
from .softmax_tiles import softmax_backward, softmax_forward

# Beyond this spread of the logits, weights relative to the map's largest leave the range of fp32.
MAX_LOGIT_RANGE = 60.0
# Maps of no more pixels are pooled by softmax when every query reads all of them.
SMALL_MAP = 400
# Marks, in place of margins, that the softmax blocks made the result.
BY_SOFTMAX = -1


class _Operands:
    """Maps and groups as one batch axis in the working dtype, with what forward and backward both need."""

    def __init__(self, x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int):
        b, c, h, w = x.shape
        g, ho, wo = sigma.shape[1:]
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.shape = (b * g, c // g, h, w)
        self.channels_last = is_channels_last(x, g)
        self.x = x.reshape(self.shape)
        logits = weight_logits.to(self.dtype).reshape(b * g, h, w)
        self.weights = (logits - logits.amax((1, 2), keepdim=True)).exp_()
        self.scale = exponent_scale(sigma, self.dtype).reshape(b * g, ho, wo)
        self.geometry = Geometry.make((ho, wo), (h, w), stride, self.scale)

    def bands(self, margins: Tensor) -> Iterator[Band]:
        return iter_bands(margins, *self.shape[2:], self.shape[1] + 1)

    def empty(self, b: int, c: int, h: int, w: int) -> Tensor:
        return empty_maps(self.scale, (b, c, h, w), self.channels_last)

    def temporary(self, slot: str, b: int, c: int, h: int, w: int) -> Tensor:
        """Workspace for `(b, c, h, w)` in the layout of the maps."""
        if self.channels_last:
            return workspace.take(slot, self.scale, b, h, w, c).permute(0, 3, 1, 2)
        return workspace.take(slot, self.scale, b, c, h, w)

    def band_maps(self, slot: str, band: Band) -> Tensor:
        """Workspace for `(b, C + 1, H, columns)`."""
        return self.temporary(slot, band.b1 - band.b0, self.shape[1] + 1, self.shape[2], band.x1 - band.x0)

    def features(self, band: Band) -> Tensor:
        """`(b, C + 1, H * columns)`: weighted features that the band reads, and the weights as one more channel."""
        c = self.shape[1]
        out = self.band_maps('features', band)
        weights = self.weights[band.b0:band.b1, None, :, band.x0:band.x1]
        torch.mul(self.x[band.b0:band.b1, :, :, band.x0:band.x1], weights, out=out[:, :c])
        out[:, c:] = weights
        return out.flatten(2)

    def factors(self, band: Band, strip: Strip) -> tuple[Tensor, Tensor]:
        """Row factor `(b, queries, rows)` and column factor `(b, queries, columns)`."""
        scale = self.scale[band.b0:band.b1, strip.r0:strip.r1, band.c0:band.c1, None]
        gy = axis_factor(self.geometry.rows[strip.r0:strip.r1, None, strip.y0:strip.y1], scale)
        gx = axis_factor(self.geometry.cols[band.c0:band.c1, band.x0:band.x1], scale)
        return gy.flatten(1, 2), gx.flatten(1, 2)

    def pair_weights(self, gy: Tensor, gx: Tensor) -> Tensor:
        """`(b, queries, rows * columns)`: weights relative to each query's nearest pixel; valid until the next call."""
        out = workspace.take('weights', self.scale, *gy.shape, gx.shape[2])
        return torch.mul(gy[..., None], gx[:, :, None], out=out).flatten(2)

    def channel_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """`(a * b).sum(1)` of two sets of maps, a few maps at a time."""
        out = self.scale.new_empty(a.shape[0], *a.shape[2:])
        step = max(1, CHUNK_ELEMENTS // max(1, a[0].numel()))
        for b0 in range(0, a.shape[0], step):
            part = slice(b0, b0 + step)
            product = self.temporary('products', *a[part].shape)
            torch.sum(torch.mul(a[part], b[part], out=product), 1, out=out[part])
        return out


def _needs_softmax(weight_logits: Tensor, sigma: Tensor) -> bool:
    h, w = weight_logits.shape[-2:]
    if h * w <= SMALL_MAP and reads_whole_map(sigma, h, w):
        return True
    low, high = weight_logits.flatten(2).aminmax(dim=-1)
    return not float((high.float() - low.float()).amax()) <= MAX_LOGIT_RANGE


def tiled_forward(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pools without forming all pairs.

    Returns:
        The maps `(B, C, Ho, Wo)`, and for the backward pass each query's total weight `(B G, Ho, Wo)` and the
        margins of `skippable_margins`, or `BY_SOFTMAX` in their place.
    """
    h, w = x.shape[2:]
    g, ho, wo = sigma.shape[1:]
    n, cg = x.shape[0] * g, x.shape[1] // g
    if not x.numel():
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = empty_maps(x, (x.shape[0], x.shape[1], ho, wo), is_channels_last(x, g)).zero_()
        return y, x.new_zeros(n, ho, wo, dtype=dtype), x.new_zeros(4, n, ho, wo, dtype=torch.int16)
    if _needs_softmax(weight_logits, sigma):
        y = softmax_forward(x, weight_logits, sigma, stride)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return y, x.new_zeros(n, ho, wo, dtype=dtype), x.new_full((4, n, ho, wo), BY_SOFTMAX, dtype=torch.int16)
    op = _Operands(x, weight_logits, sigma, stride)
    y = empty_maps(x, (n, cg, ho, wo), op.channels_last)
    total = torch.empty_like(op.scale)
    if reads_whole_map(sigma, h, w):
        margins = x.new_zeros(4, n, ho, wo, dtype=torch.int16)
    else:
        margins = skippable_margins(op.weights, op.scale, op.geometry, TOLERANCE[x.dtype])
    for band in op.bands(margins):
        bs, cs = slice(band.b0, band.b1), slice(band.c0, band.c1)
        read = band.x1 - band.x0
        features = op.features(band)
        for strip in band.strips:
            rs = slice(strip.r0, strip.r1)
            weights = op.pair_weights(*op.factors(band, strip))
            window = features[:, :, strip.y0 * read:strip.y1 * read]
            out = matmul(window, weights.transpose(1, 2), op.channels_last)
            out = out.unflatten(2, (strip.r1 - strip.r0, band.c1 - band.c0))
            total[bs, rs, cs] = out[:, cg]
            torch.mul(out[:, :cg], out[:, cg:].reciprocal(), out=y[bs, :, rs, cs])
    return join_groups(y, x.shape[0], x.shape[1]), total, margins


def tiled_backward(
        grad: Tensor,
        x: Tensor,
        weight_logits: Tensor,
        sigma: Tensor,
        y: Tensor,
        total: Tensor,
        margins: Tensor,
        stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight_logits` and `sigma`, each in the dtype and layout of its input.

    With weights A, `d = dy . y` and squared distances D: `dx = A^T dy`, `dl_j = x_j . dx_j - sum_i A_ij d_i` and
    `dsigma_i = sigma_i^-3 sum_j A_ij D_ij (dy_i . x_j - d_i)`.
    """
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight_logits), torch.zeros_like(sigma)
    if int(margins.view(-1)[0]) == BY_SOFTMAX:
        dx, dlogits, dsigma = softmax_backward(grad, x, weight_logits, sigma, stride)
    else:
        dx, dlogits, dsigma = _windowed_backward(grad, x, weight_logits, sigma, y, total, margins, stride)
    # One division at a time: the cube of a small support underflows.
    for _ in range(3):
        dsigma = dsigma / sigma
    return dx.to(x.dtype), dlogits.to(weight_logits.dtype), dsigma.to(sigma.dtype)


def _windowed_backward(
        grad: Tensor,
        x: Tensor,
        weight_logits: Tensor,
        sigma: Tensor,
        y: Tensor,
        total: Tensor,
        margins: Tensor,
        stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the working dtype, that of `sigma` times its cube."""
    h, w = x.shape[2:]
    ho, wo = sigma.shape[-2:]
    op = _Operands(x, weight_logits, sigma, stride)
    n, cg = op.shape[:2]
    grad = grad.reshape(n, cg, ho, wo)
    inverse = total.reciprocal()
    dot = op.channel_dot(grad, y.reshape(n, cg, ho, wo)).mul_(inverse).neg_()
    dx = op.empty(n, cg, h, w).zero_()
    dweights = torch.zeros_like(op.weights)
    dsigma = torch.empty_like(total)
    for band in op.bands(margins):
        bs, cs = slice(band.b0, band.b1), slice(band.c0, band.c1)
        maps, cols, read = band.b1 - band.b0, band.c1 - band.c0, band.x1 - band.x0
        features = op.features(band)
        dfeatures = op.band_maps('gradients', band).zero_()
        dx2 = op.geometry.cols[cs, band.x0:band.x1]
        for strip in band.strips:
            rs, window = slice(strip.r0, strip.r1), slice(strip.y0 * read, strip.y1 * read)
            gy, gx = op.factors(band, strip)
            weights = op.pair_weights(gy, gx)
            dout = op.empty(maps, cg + 1, strip.r1 - strip.r0, cols)
            torch.mul(grad[bs, :, rs, cs], inverse[bs, None, rs, cs], out=dout[:, :cg])
            dout[:, cg] = dot[bs, rs, cs]
            dout = dout.flatten(2)
            accumulate_matmul(dfeatures.flatten(2)[:, :, window], dout, weights, op.channels_last)
            products = workspace.take('products', weights, *weights.shape)
            torch.bmm(dout.transpose(1, 2), features[:, :, window], out=products)
            dy2 = op.geometry.rows[rs, strip.y0:strip.y1].repeat_interleave(cols, 0)
            row_sums = torch.stack([gy, gy * dy2], 2).flatten(0, 1)
            row_sums = torch.bmm(row_sums, products.view(-1, dy2.shape[1], read)).view(maps, -1, cols, 2, read)
            moment = (row_sums[:, :, :, 0] * dx2).add_(row_sums[:, :, :, 1])
            dsigma[bs, rs, cs] = moment.mul_(gx.view(moment.shape)).sum(-1)
        dx[bs, :, :, band.x0:band.x1] += dfeatures[:, :cg]
        dweights[bs, :, band.x0:band.x1] += dfeatures[:, cg]
    dlogits = op.channel_dot(op.x, dx).add_(dweights).mul_(op.weights)
    dx *= op.weights[:, None]
    return dx.view(x.shape), dlogits.view(weight_logits.shape), dsigma.view(sigma.shape)
