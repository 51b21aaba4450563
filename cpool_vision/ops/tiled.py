"""Exact context pooling in memory linear in the number of pixels: strips of queries, each reading a certified window.

The weights of a strip are made, used in matrix products and dropped; the backward pass makes them again.
"""
import torch
from torch import Tensor

from . import workspace
from .checks import check_arguments, check_aside, check_gradient
from .layout import accumulate_matmul, empty_maps, is_channels_last
from .plan import Band
from .reference import share_out
from .weights import plan_weights, recall_weights


class _Maps:
    """Feature maps, maps and groups being one batch axis, read and written band by band in the working dtype."""

    def __init__(self, x: Tensor, groups: int):
        self.shape = (x.shape[0] * groups, x.shape[1] // groups)
        self.x = self.split(x)
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.channels_last = is_channels_last(x, groups)

    def split(self, maps: Tensor) -> Tensor:
        """`(B, C, H, W)` as `(B G, C / G, H, W)`."""
        return maps.reshape(*self.shape, *maps.shape[2:])

    def temporary(self, slot: str, maps: int, height: int, width: int) -> Tensor:
        """Workspace for `(maps, C, height, width)` in the layout of the maps."""
        c = self.x.shape[1]
        like = self.x if self.x.dtype == self.dtype else self.x.new_empty(0, dtype=self.dtype)
        if self.channels_last:
            return workspace.take(slot, like, maps, height, width, c).permute(0, 3, 1, 2)
        return workspace.take(slot, like, maps, c, height, width)

    def rows_of(self, band: Band) -> Tensor:
        """`(b, C, H, columns)` of the band's columns, in which any range of rows is one matrix."""
        part = self.x[band.b0:band.b1, :, :, band.x0:band.x1]
        h, w = self.x.shape[2:]
        whole = band.x1 - band.x0 == w and part.dtype == self.dtype
        if whole and (self.channels_last or part.is_contiguous()):
            return part
        return self.temporary('features', part.shape[0], h, part.shape[3]).copy_(part)


def tiled_forward(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pools without forming all pairs, see `context_pool2d`.

    Returns:
        The maps `(B, C, Ho, Wo)` in the layout of `x`, and for the backward pass the margins `(4, B G, Ho, Wo)` that
        each query may skip.
    """
    check_arguments(x, weight_logits, sigma, stride, offset)
    groups, (ho, wo) = weight_logits.shape[1], sigma.shape[2:]
    maps = _Maps(x, groups)
    pooled = empty_maps(x, (*x.shape[:2], ho, wo), maps.channels_last, maps.dtype)
    y = maps.split(pooled)
    if not x.numel():
        return pooled.to(x.dtype), x.new_zeros(4, maps.shape[0], ho, wo, dtype=torch.int16)
    pair_weights, margins = plan_weights(x, weight_logits, sigma, stride, offset)
    for band in pair_weights.bands(margins, maps.x.shape[1]):
        features, read = maps.rows_of(band).flatten(2), band.x1 - band.x0
        cols = band.c1 - band.c0
        for strip in band.strips:
            weights = pair_weights.of(band, strip).flatten(2).transpose(1, 2)
            window = features[:, :, strip.y0 * read:strip.y1 * read]
            area = y[band.b0:band.b1, :, strip.r0:strip.r1, band.c0:band.c1]
            if cols == wo:
                out = y[band.b0:band.b1].flatten(2)[:, :, strip.r0 * wo:strip.r1 * wo]
                accumulate_matmul(out, window, weights, maps.channels_last, beta=0)
            else:
                out = maps.temporary('out', area.shape[0], area.shape[2], area.shape[3])
                accumulate_matmul(out.flatten(2), window, weights, maps.channels_last, beta=0)
                area.copy_(out)
    return pooled.to(x.dtype), margins


def tiled_backward(
        grad: Tensor,
        x: Tensor,
        weight_logits: Tensor,
        sigma: Tensor,
        margins: Tensor,
        stride: int,
        offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `x`, `weight_logits`, `sigma` and `offset`, each in the dtype and layout of its input.

    With weights A, squared distances D and `u_ij = A_ij (dy_i . x_j - sum_k A_ik dy_i . x_k)`: `dx = A^T dy`,
    `dl_j = sum_i u_ij`, `dsigma_i = sigma_i^-3 sum_j u_ij D_ij` and `doffset_i = sigma_i^-2 sum_j u_ij p_j`.
    """
    check_arguments(x, weight_logits, sigma, stride, offset)
    check_gradient(grad, x, sigma)
    groups, (ho, wo) = weight_logits.shape[1], sigma.shape[2:]
    maps = _Maps(x, groups)
    check_aside('margins', margins, (4, maps.shape[0], ho, wo), torch.int16, x)
    if not x.numel():
        return (torch.zeros_like(x), torch.zeros_like(weight_logits), torch.zeros_like(sigma),
                None if offset is None else torch.zeros_like(offset))
    h, w = x.shape[2:]
    grads = maps.split(grad)
    dinput = empty_maps(x, x.shape, maps.channels_last, maps.dtype).zero_()
    dx = maps.split(dinput)
    dlogits = dx.new_zeros(maps.shape[0], h, w)
    dsigma = dx.new_empty(maps.shape[0], ho, wo)
    doffset = None if offset is None else dx.new_empty(maps.shape[0], 2, ho, wo)
    pair_weights = recall_weights(x, weight_logits, sigma, stride, offset, margins)
    rows, cols = pair_weights.geometry
    # Of pixels from each cell's own, for what is left of a sum of u to stay small.
    steps = [torch.arange(n, device=x.device) - stride * torch.arange(m, device=x.device)[:, None]
             for m, n in ((ho, h), (wo, w))]
    for band in pair_weights.bands(margins, maps.x.shape[1]):
        bs, cs, xs = slice(band.b0, band.b1), slice(band.c0, band.c1), slice(band.x0, band.x1)
        features, read = maps.rows_of(band).flatten(2), band.x1 - band.x0
        dfeatures = dx[bs] if read == w else maps.temporary('gradients', band.b1 - band.b0, h, read).zero_()
        for strip in band.strips:
            rs, ys = slice(strip.r0, strip.r1), slice(strip.y0, strip.y1)
            window = slice(strip.y0 * read, strip.y1 * read)
            weights = pair_weights.of(band, strip)
            dy = grads[bs, :, rs, cs]
            dy = maps.temporary('out', dy.shape[0], dy.shape[2], dy.shape[3]).copy_(dy).flatten(2)
            pairs = weights.flatten(2)
            accumulate_matmul(dfeatures.flatten(2)[:, :, window], dy, pairs, maps.channels_last)
            u = workspace.take('products', weights, *pairs.shape)
            torch.bmm(dy.transpose(1, 2), features[:, :, window], out=u).mul_(pairs)
            u.addcmul_(pairs, u.sum(-1, keepdim=True), value=-1)
            u = u.view(weights.shape)
            dlogits[bs, ys, xs] += u.sum(1)
            part, grid = (bs, rs, cs), (-1, band.c1 - band.c0)
            by_row, by_col = u.sum(3).unflatten(1, grid), u.sum(2).unflatten(1, grid)
            dsigma[part] = (by_row * rows[part][..., ys]).sum(-1) + (by_col * cols[part][..., xs]).sum(-1)
            if doffset is not None:
                doffset[bs, 0, rs, cs] = (by_row * steps[0][rs, None, ys]).sum(-1)
                doffset[bs, 1, rs, cs] = (by_col * steps[1][cs, xs]).sum(-1)
        if read != w:
            dx[bs, :, :, xs] += dfeatures
    supports = share_out(sigma, groups)
    dsigma = dsigma.view(supports.shape)
    if offset is not None and doffset is not None:
        doffset = doffset.view(x.shape[0], groups, 2, ho, wo)
        for _ in range(2):
            doffset = doffset / supports[:, :, None]
        doffset = doffset.sum_to_size(offset.shape).to(offset.dtype)
    # One division at a time: the cube of a small support underflows.
    for _ in range(3):
        dsigma = dsigma / supports
    dsigma = dsigma.unflatten(1, (sigma.shape[1], -1)).sum(2)
    dlogits = dlogits.view(weight_logits.shape).to(weight_logits.dtype)
    return dinput.to(x.dtype), dlogits, dsigma.to(sigma.dtype), doffset
