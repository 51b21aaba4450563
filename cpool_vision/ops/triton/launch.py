"""Launches the kernels: allocation, strides, grids and shipped configurations. Nothing is read on the host."""
import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..layout import empty_maps, is_channels_last
from ..plan import QUERY_TILE, TOLERANCE
from .backward import grad_features, grad_logits, grad_supports
from .common import KEY_TILE, SEARCH
from .forward import pool_forward

# fp16 weights are scaled by this power of 2 in the product with dy: small ones would be subnormal.
SHIFT = {torch.float16: 10, torch.bfloat16: 0, torch.float32: 0}


class Config(NamedTuple):
    """Shipped configuration of a kernel: channels of a block and launch options."""
    block_c: int
    num_warps: int
    num_stages: int


def choose_config(kernel: Any, channels: int, dtype: torch.dtype, channels_last: bool) -> Config:
    """The configuration for maps of so many channels per group.

    Fixed, so that results never depend on timing: the widest channel blocks that leave no register spilled.
    """
    half = dtype != torch.float32
    if kernel is grad_features:
        widest = 128 if half else 64
    elif kernel is pool_forward and half:
        widest = 128 if channels_last else 64
    else:
        widest = 64 if half else 32
    return Config(min(max(16, triton.next_power_of_2(channels)), widest), 8, 2)


def tile_constants() -> dict[str, int]:
    """Tile sides as the kernels name them."""
    return {'QUERY_H': QUERY_TILE[0], 'QUERY_W': QUERY_TILE[1], 'KEY_H': KEY_TILE[0], 'KEY_W': KEY_TILE[1]}


def count_tiles(height: int, width: int, tile: tuple[int, int]) -> int:
    """Tiles that cover a map."""
    return triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1])


def _sizes(x: Tensor, sigma: Tensor, stride: int) -> tuple[int, ...]:
    groups, out_height, out_width = sigma.shape[1:]
    return (*x.shape[2:], out_height, out_width, groups, x.shape[1] // groups, stride)


def _run(kernel: Any, x: Tensor, planes: int, tiles: int, channels: int, by_block: bool, *args: Any,
         **constants: int) -> None:
    config = choose_config(kernel, channels, x.dtype, x.stride(1) == 1)
    grid = planes * tiles * (triton.cdiv(channels, config.block_c) if by_block else 1)
    on_device: Callable[..., Any] = torch.cuda.device if x.is_cuda else contextlib.nullcontext
    with on_device(x.device):
        kernel[(grid,)](
            *args, **tile_constants(), **constants, BLOCK_C=config.block_c, num_warps=config.num_warps,
            num_stages=config.num_stages)


def triton_forward(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pools in one pass over the key tiles that each query tile must read.

    Returns:
        The maps `(B, C, Ho, Wo)` in the layout of `x`, and for the backward pass, the norm `(B, G, Ho, Wo, 2)` of
        every query in fp32 (its largest exponent, and log2 of the sum of the weights relative to that one), and the
        reach `(B G, tiles, 4)` of every query tile in key tiles (first and last + 1 row, first and last + 1 column).
    """
    sizes = _sizes(x, sigma, stride)
    _, _, out_height, out_width, groups, channels = sizes[:6]
    b, tiles = x.shape[0], count_tiles(out_height, out_width, QUERY_TILE)
    y = empty_maps(x, (b, x.shape[1], out_height, out_width), is_channels_last(x, groups))
    norm = x.new_empty(*sigma.shape, 2, dtype=torch.float32)
    reach = x.new_empty(b * groups, tiles, 4, dtype=torch.int32)
    if not x.numel():
        return y, norm, reach
    peak = weight_logits.amax((2, 3)).float()
    _run(pool_forward, x, b * groups, tiles, channels, True,
         x, weight_logits, sigma, peak, y, norm, reach,
         *x.stride(), *y.stride(), *weight_logits.stride(), *sigma.stride(),
         *sizes, math.log(TOLERANCE[x.dtype]))
    return y, norm, reach


def triton_backward(
        grad: Tensor,
        x: Tensor,
        weight_logits: Tensor,
        sigma: Tensor,
        norm: Tensor,
        reach: Tensor,
        stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight_logits` and `sigma`, each in the dtype of its input; that of `x` in its layout."""
    if not x.numel():
        return torch.zeros_like(x), weight_logits.new_zeros(weight_logits.shape), sigma.new_zeros(sigma.shape)
    sizes = _sizes(x, sigma, stride)
    height, width, _, _, groups, channels = sizes[:6]
    planes = x.shape[0] * groups
    tiles, keys = reach.shape[1], count_tiles(height, width, KEY_TILE)
    grad = grad.to(x.dtype)
    dx = empty_maps(x, x.shape, is_channels_last(x, groups))
    dlogits, dsigma = weight_logits.new_empty(weight_logits.shape), sigma.new_empty(sigma.shape)
    dot = norm.new_empty(sigma.shape)
    small = (*weight_logits.stride(), *sigma.stride())
    _run(grad_supports, x, planes, tiles, channels, False,
         grad, x, weight_logits, sigma, norm, reach, dot, dsigma,
         *grad.stride(), *x.stride(), *small, *sizes)
    _run(grad_logits, x, planes, keys, channels, False,
         grad, x, weight_logits, sigma, norm, reach, dot, dlogits,
         *grad.stride(), *x.stride(), *small, *sizes, SEARCH=SEARCH)
    _run(grad_features, x, planes, keys, channels, True,
         grad, dx, weight_logits, sigma, norm, reach,
         *grad.stride(), *dx.stride(), *small, *sizes, SEARCH=SEARCH, SHIFT=SHIFT[x.dtype])
    return dx, dlogits, dsigma
