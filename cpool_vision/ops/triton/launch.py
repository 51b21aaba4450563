"""Launches the kernels: allocation, strides, grids and shipped configurations. Nothing is read on the host."""
import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_maps, is_channels_last
from ..plan import TOLERANCE
from .backward import grad_keys, grad_queries
from .forward import pool
from .layout import Kept, block_width, round_up
from .prepare import prepare

# Maps of no more pixels are read whole by every query.
WHOLE_UP_TO = 256
# Nats that a query's own pixel may lie below the map's largest logit while sums of weights relative to that are exact.
LIMIT = {torch.float32: 30.0, torch.bfloat16: 60.0, torch.float16: 18.0}
# fp16 weights are scaled by these powers of 2 in products: small ones would be subnormal.
SHIFT_FORWARD = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 15.0}
SHIFT_BACKWARD = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 10}


class Config(NamedTuple):
    """A tile's rows and columns, rows of a chunk, channels of a block and of the rest behind it, launch options."""
    tile_h: int
    tile_w: int
    chunk: int
    block_c: int
    tail: int
    num_warps: int
    num_stages: int


def split_channels(channels: int, widest: int) -> tuple[int, int]:
    """Channels of a block and of the rest that the same program takes: 96 = 64 + 32, 768 = 12 * 64 + 0."""
    for block in (32, 64, 128):
        rest = channels - block
        if block <= widest and 16 <= rest < block and rest == triton.next_power_of_2(rest):
            return block, rest
    return min(max(16, triton.next_power_of_2(channels)), widest), 0


# Rows, columns and chunk of a tile by the width of a block of columns; of maps that are read whole and of larger ones.
_TILES: dict[tuple[Any, int, bool], tuple[int, int, int]] = {
    (pool, 16, True): (8, 16, 2), (grad_queries, 16, True): (8, 16, 2), (grad_keys, 16, True): (8, 16, 1),
    (pool, 16, False): (4, 16, 4), (grad_queries, 16, False): (4, 16, 2), (grad_keys, 16, False): (4, 16, 2),
    (pool, 8, True): (8, 8, 8), (grad_queries, 8, True): (8, 8, 4), (grad_keys, 8, True): (8, 8, 4),
    (pool, 8, False): (8, 8, 8), (grad_queries, 8, False): (8, 8, 4), (grad_keys, 8, False): (8, 8, 4),
}


def choose_config(kernel: Any, height: int, width: int, channels: int, dtype: torch.dtype) -> Config:
    """The configuration for maps of so many pixels and channels per group; fixed, so that results never vary.

    Chosen by simulated time among those that spill no registers, see `benchmarks.kernel_cost`.
    """
    half = dtype != torch.float32
    block = block_width(width)
    tile = _TILES[kernel, block, height * width <= WHOLE_UP_TO]
    if not half or channels > 64 and block == 16:
        tile = (64 // block, block, 32 // block)
    if kernel is grad_keys:
        # A rest would cost two more products an iteration, and gain nothing.
        widest = 128 if half else 32
        return Config(*tile, min(max(16, triton.next_power_of_2(channels)), widest), 0, 4, 1)
    return Config(*tile, *split_channels(channels, 64 if half else 32), 4, 1)


def _sizes(x: Tensor, weight_logits: Tensor, sigma: Tensor) -> tuple[int, ...]:
    return (*x.shape[2:], *sigma.shape[2:], weight_logits.shape[1])


def needs_wide_index(*maps: Tensor) -> bool:
    """Whether offsets within an image exceed 32 bits."""
    return any(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) + 16 * max(t.stride()[2:])
               >= 2 ** 31 for t in maps)


def _constants(kernel: Any, config: Config, x: Tensor, groups: int, stride: int, **more: Any) -> dict[str, Any]:
    """Compile-time arguments that the kernels share."""
    height, width = x.shape[2:]
    channels = x.shape[1] // groups
    xw = block_width(width)
    return {
        'CHANNELS': channels, 'BLOCK_C': config.block_c, **({} if kernel is grad_keys else {'TAIL': config.tail}),
        'TILE_H': config.tile_h, 'TILE_W': config.tile_w, 'CHUNK': config.chunk,
        'XW': xw, 'X_BLOCKS': -(-width // xw), 'WHOLE': height * width <= WHOLE_UP_TO, 'STRIDE': stride,
        'PRECISION': 'tf32x3' if x.dtype == torch.float32 else 'ieee',
        'num_warps': config.num_warps, 'num_stages': config.num_stages, **more}


def _channel_blocks(config: Config, channels: int) -> int:
    return 1 if config.tail else -(-channels // config.block_c)


def _tiles(config: Config, height: int, width: int, xw: int) -> int:
    return -(-height // config.tile_h) * -(-round_up(width, xw) // config.tile_w)


def _on(x: Tensor) -> Any:
    on_device: Callable[..., Any] = torch.cuda.device if x.is_cuda else contextlib.nullcontext
    return on_device(x.device)


def triton_forward(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pools every query over the keys that it must read.

    Args:
        x: features `(B, C, H, W)` of any strides.
        weight_logits: `(B, G, H, W)`.
        sigma: `(B, Gs, Ho, Wo)`; group g has the supports of `g // (G / Gs)`.
        stride: output cells are `stride` pixels apart.
        out: where to write, `(B, C, Ho, Wo)` of any strides and the dtype of `x`; by default maps in the layout of `x`.

    Returns:
        The pooled maps, `out` if given, and what the backward pass needs: fp32 `(B G, n)`, see `layout.Kept`.
    """
    b, c, height, width = x.shape
    out_height, out_width = sigma.shape[2:]
    groups = weight_logits.shape[1]
    channels = c // groups
    kept_size = Kept.of(height, width, out_height, out_width).size
    y = empty_maps(x, (b, c, out_height, out_width), is_channels_last(x, 1)) if out is None else out
    kept = x.new_empty(b * groups, kept_size, dtype=torch.float32)
    if not x.numel():
        return y, kept
    xw = block_width(width)
    sizes = _sizes(x, weight_logits, sigma)
    shift = SHIFT_FORWARD[x.dtype]
    config = choose_config(pool, out_height, out_width, channels, x.dtype)
    block = min(1024, triton.next_power_of_2(max(round_up(height, 16), round_up(out_height, 16)) * 16))
    with _on(x):
        prepare[(b * groups,)](
            weight_logits, sigma, kept, *weight_logits.stride(), *sigma.stride(), *sizes, groups // sigma.shape[1],
            kept_size, math.log(TOLERANCE[x.dtype]), LIMIT[x.dtype], shift,
            XW=xw, BLOCK=block, STRIDE=stride, num_warps=max(1, min(8, block // 128)))
        grid = b * groups * _tiles(config, out_height, out_width, xw) * _channel_blocks(config, channels)
        pool[(grid,)](
            x, y, kept, *x.stride(), *y.stride(), *sizes, kept_size, shift,
            **_constants(pool, config, x, groups, stride, INDEX=tl.int64 if needs_wide_index(x, y) else tl.int32))
    return y, kept


def triton_backward(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, kept: Tensor, stride: int,
        dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight_logits` and `sigma`, each in the dtype of its input.

    Args:
        grad: that of the pooled maps, of any strides.
        x: as in the forward pass, like `weight_logits`, `sigma` and `stride`.
        weight_logits: see `x`.
        sigma: see `x`.
        kept: of the forward pass.
        stride: see `x`.
        dx: where to write the gradient of `x`, of any strides; by default maps in the layout of `x`.
    """
    b, _, height, width = x.shape
    support_groups, out_height, out_width = sigma.shape[1:]
    groups = weight_logits.shape[1]
    if dx is None:
        dx = empty_maps(x, x.shape, is_channels_last(x, 1))
    if not x.numel():
        return dx, weight_logits.new_zeros(weight_logits.shape), sigma.new_zeros(sigma.shape)
    channels = x.shape[1] // groups
    xw = block_width(width)
    sizes = _sizes(x, weight_logits, sigma)
    shared = groups // support_groups
    grad = grad.to(x.dtype)
    queries = round_up(out_height, 16) * round_up(out_width, xw)
    sums = kept.new_empty(b * groups, 2 * queries)
    dsigma = sigma.new_empty(b, groups, out_height, out_width, dtype=sigma.dtype if shared == 1 else torch.float32)
    of_queries = choose_config(grad_queries, out_height, out_width, channels, x.dtype)
    of_keys = choose_config(grad_keys, height, width, channels, x.dtype)
    parts = _channel_blocks(of_keys, channels)
    dlogits = (weight_logits.new_empty(weight_logits.shape) if parts == 1
               else kept.new_empty(parts, *weight_logits.shape))
    index = tl.int64 if needs_wide_index(x, grad, dx) else tl.int32
    with _on(x):
        grad_queries[(b * groups * _tiles(of_queries, out_height, out_width, xw),)](
            grad, x, kept, sums, sigma, dsigma, *grad.stride(), *x.stride(), *sigma.stride(),
            *sizes, shared, kept.shape[1],
            **_constants(grad_queries, of_queries, x, groups, stride, INDEX=index))
        grad_keys[(b * groups * _tiles(of_keys, height, width, xw) * parts,)](
            grad, x, dx, kept, sums, dlogits, *grad.stride(), *x.stride(), *dx.stride(),
            *sizes, kept.shape[1], b * groups,
            **_constants(grad_keys, of_keys, x, groups, stride, INDEX=index, Q_BLOCKS=-(-out_width // xw),
                         ROWS=triton.next_power_of_2(out_height), SHIFT=SHIFT_BACKWARD[x.dtype]))
    if shared > 1:
        dsigma = dsigma.view(b, support_groups, shared, out_height, out_width).sum(2).to(sigma.dtype)
    if parts > 1:
        dlogits = dlogits.sum(0).to(weight_logits.dtype)
    return dx, dlogits, dsigma
