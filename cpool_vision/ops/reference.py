"""The definition of context pooling, dense: the oracle every other implementation is judged against."""
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_arguments

# Of supports: 1 / sigma^3 is finite. Smaller ones, pixels being one apart, give the same weights.
SMALLEST = {torch.float32: 1e-12, torch.float64: 1e-100}


def squared_offsets(out_size: int, in_size: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Squared distances along one axis, in input pixels, from output cell centers to pixel centers.

    Less each cell's smallest, which softmax does not see: `(j - n)(j + n - 2 center)` with n the nearest pixel. Both
    factors are integers, so every value is rounded once at most, and logits are not lost beside large distances.

    Returns:
        `(out_size, in_size)` of `dtype`, zero at each cell's nearest pixel.
    """
    doubled = (2 * stride * torch.arange(out_size, device=device) + (stride - 1))[:, None]
    at = torch.arange(in_size, device=device)[None, :]
    nearest = (doubled // 2).clamp(max=in_size - 1)
    return (at - nearest).to(dtype) * (at + nearest - doubled).to(dtype)


def offset_tables(
        offset: Tensor, out_size: Sequence[int], in_size: Sequence[int], stride: int) -> tuple[Tensor, Tensor]:
    """`squared_offsets` of both axes for cells moved by `offset` `(B, G, 2, Ho or 1, Wo or 1)`.

    Differentiable in `offset`; the nearest pixel, which softmax does not see, counts as a constant.

    Returns:
        `(B, G, Ho, Wo or 1, H)` and `(B, G, Ho or 1, Wo, W)`.
    """
    rows, cols = offset.unbind(2)
    return (_moved_squares(rows.transpose(2, 3), out_size[0], in_size[0], stride).transpose(2, 3),
            _moved_squares(cols, out_size[1], in_size[1], stride))


def _moved_squares(offset: Tensor, out_size: int, in_size: int, stride: int) -> Tensor:
    index = torch.arange(max(out_size, in_size), device=offset.device).to(offset.dtype)
    center, at = (stride * index[:out_size] + (stride - 1) / 2), index[:in_size]
    nearest = (center + offset.detach()).round().clamp(0, in_size - 1)[..., None]
    # Index beside index first: a sum of center and offset would round away what small supports see.
    return (at - nearest) * (at - center[:, None] + (nearest - center[:, None]) - 2 * offset[..., None])


def exponent_scale(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """`-1 / (2 sigma^2)` in the working dtype, with finite values and derivatives for the smallest supports."""
    inverse = sigma.to(dtype).clamp(min=SMALLEST[dtype]).reciprocal()
    return inverse.square() * -0.5


def share_out(maps: Tensor, groups: int) -> Tensor:
    """Maps `(B, Gs, ...)` of groups that share them as `(B, groups, ...)`, repeated where they must be."""
    shared = maps.shape[1]
    return maps if shared == groups else maps.repeat_interleave(groups // shared, 1)


def context_pool2d_reference(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1, offset: Tensor | None = None) -> Tensor:
    """Pools every output cell's neighborhood with learned weights and a learned Gaussian support, densely.

    `y[b, c, i] = sum_j softmax_j(l_j - |p_i + o_i - p_j|^2 / (2 sigma_i^2)) x[b, c, j]` over all pixels j of the map
    (Huang et al., ICML 2022, https://arxiv.org/abs/2207.01844). Time and memory grow with `(H W)(Ho Wo)`.
    Differentiable by autograd to any order, in both modes. Arguments and result are those of `context_pool2d`.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: wrong rank or shape, groups that do not divide, `stride < 1`, or tensors on several devices.
    """
    check_arguments(x, weight_logits, sigma, stride, offset)
    b, c, h, w = x.shape
    g, ho, wo = weight_logits.shape[1], *sigma.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale = share_out(exponent_scale(sigma, dtype), g)
    if offset is None:
        dy = squared_offsets(ho, h, stride, dtype, x.device)
        dx = squared_offsets(wo, w, stride, dtype, x.device)
        dist = (dy[:, None, :, None] + dx[None, :, None, :]).view(ho * wo, h * w)
        exponents = scale.reshape(b, g, ho * wo, 1) * dist
    else:
        dy, dx = offset_tables(offset.to(dtype), (ho, wo), (h, w), stride)
        exponents = (scale[..., None] * dy)[..., None] + (scale[..., None] * dx)[..., None, :]
        exponents = exponents.view(b, g, ho * wo, h * w)
    attn = (weight_logits.to(dtype).reshape(b, g, 1, h * w) + exponents).softmax(-1)
    y = attn @ x.to(dtype).reshape(b, g, c // g, h * w).transpose(-2, -1)
    return y.transpose(-2, -1).reshape(b, c, ho, wo).to(x.dtype)
