"""Exact context pooling in blocks of query rows that read the whole map, by a softmax in log space.

Two cases take this way: maps so small that forming every weight is cheaper than touching the features more often, and
weight logits so far apart (or not finite) that exponentials relative to the map's largest would underflow.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from . import workspace
from .layout import accumulate_matmul, empty_maps, is_channels_last, join_groups
from .plan import CHUNK_ELEMENTS, exponent_scale
from .reference import squared_offsets

Block = tuple[slice, slice]


class _Blocks:
    """Maps and groups as one batch axis, and the weights of any block of queries."""

    def __init__(self, x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int):
        b, c, h, w = x.shape
        g, ho, wo = sigma.shape[1:]
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.maps, self.channels, self.pixels = b * g, c // g, h * w
        self.channels_last = is_channels_last(x, g)
        self.x = x.reshape(self.maps, self.channels, self.pixels)
        self.logits = weight_logits.to(self.dtype).reshape(self.maps, 1, self.pixels)
        self.scale = exponent_scale(sigma, self.dtype).reshape(self.maps, ho, wo)
        rows = squared_offsets(ho, h, stride, self.dtype, x.device)
        cols = squared_offsets(wo, w, stride, self.dtype, x.device)
        self.rows, self.cols = rows[:, None, :, None], cols[None, :, None, :]

    def __iter__(self) -> Iterator[Block]:
        """Slices of maps and of query rows; the rows of a map come in order."""
        ho, wo = self.scale.shape[1:]
        rows = max(1, min(ho, CHUNK_ELEMENTS // (wo * self.pixels)))
        step = max(1, CHUNK_ELEMENTS // (rows * wo * self.pixels))
        for b0 in range(0, self.maps, step):
            for r0 in range(0, ho, rows):
                yield slice(b0, min(b0 + step, self.maps)), slice(r0, min(r0 + rows, ho))

    def distances(self, rs: slice) -> Tensor:
        """`(queries, H W)` squared distances in input pixels."""
        return (self.rows[rs] + self.cols).flatten(2).flatten(0, 1)

    def weights(self, bs: slice, rs: slice, distances: Tensor) -> Tensor:
        """`(b, queries, H W)`, rows of which sum to 1; valid until the next call."""
        scale = self.scale[bs, rs].flatten(1)[..., None]
        shape = (scale.shape[0], *distances.shape)
        pairs = torch.mul(distances, scale, out=workspace.take('products', scale, *shape)).add_(self.logits[bs])
        return torch.softmax(pairs, -1, out=workspace.take('weights', scale, *shape))


def softmax_forward(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> Tensor:
    """Returns the pooled maps, `(B, C, Ho, Wo)` in the dtype and layout of `x`."""
    blocks = _Blocks(x, weight_logits, sigma, stride)
    ho, wo = sigma.shape[-2:]
    y = empty_maps(x, (blocks.maps, blocks.channels, ho, wo), blocks.channels_last, blocks.dtype)
    for bs, rs in blocks:
        weights = blocks.weights(bs, rs, blocks.distances(rs))
        out = y[bs].flatten(2)[:, :, rs.start * wo:rs.stop * wo]
        accumulate_matmul(
            out, blocks.x[bs].to(blocks.dtype), weights.transpose(1, 2), blocks.channels_last, beta=0)
    return join_groups(y, x.shape[0], x.shape[1]).to(x.dtype)


def softmax_backward(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight_logits` and `sigma`."""
    blocks = _Blocks(x, weight_logits, sigma, stride)
    ho, wo = sigma.shape[-2:]
    grad = grad.reshape(blocks.maps, blocks.channels, ho, wo)
    dx = empty_maps(x, (blocks.maps, blocks.channels, *x.shape[2:]), blocks.channels_last, blocks.dtype)
    dlogits = torch.zeros_like(blocks.logits)
    dsigma = torch.empty_like(blocks.scale)
    for bs, rs in blocks:
        distances = blocks.distances(rs)
        weights = blocks.weights(bs, rs, distances)
        dy = grad[bs, :, rs].flatten(2).to(blocks.dtype)
        accumulate_matmul(dx[bs].flatten(2), dy, weights, blocks.channels_last, beta=0 if rs.start == 0 else 1)
        pairs = workspace.take('products', weights, *weights.shape)
        torch.bmm(dy.transpose(1, 2), blocks.x[bs].to(blocks.dtype), out=pairs)
        weighted = pairs.mul_(weights)
        weighted.addcmul_(weights, weighted.sum(-1, keepdim=True), value=-1)
        dlogits[bs] += weighted.sum(1, keepdim=True)
        dsigma[bs, rs] = weighted.mul_(distances).sum(-1).unflatten(1, (-1, wo))
    return dx.view(x.shape), dlogits.view(weight_logits.shape), dsigma.view(sigma.shape)
