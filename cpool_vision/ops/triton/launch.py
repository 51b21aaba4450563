"""Launches the kernels: allocation, strides, grids and shipped configurations. Nothing is read on the host."""
import contextlib
import functools
import math
from collections.abc import Callable, Sequence
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
    """A tile's rows and columns, rows of a chunk, channels of a block and of the rest after it, launch options."""
    tile_h: int
    tile_w: int
    chunk: int
    block_c: int
    tail: int
    num_warps: int = 4
    # Registers of a thread at most, which lets more programs share a multiprocessor; None: as many as it takes.
    maxnreg: int | None = None
    # Whether a chunk is read while the one before is computed, for registers.
    prefetch: bool = False


class _Rule(NamedTuple):
    """What holds for groups of up to so many channels: tile and chunk, channels of a block at most, launch options."""
    channels: float
    tile: tuple[int, int, int]
    widest: int = 64
    num_warps: int = 4
    maxnreg: int | None = None
    prefetch: bool = False
    # Whether 48 channels are a block of 32 and a rest of 16, not a block of 64.
    tail: bool = False


_ANY = math.inf
# By kernel, columns of a block, and whether maps are read whole; half precision.
_RULES: dict[tuple[Any, int, bool], tuple[_Rule, ...]] = {
    (pool, 16, True): (
        _Rule(16, (4, 16, 2), num_warps=2, maxnreg=128), _Rule(64, (8, 16, 2), prefetch=True),
        _Rule(_ANY, (4, 16, 2))),
    (pool, 16, False): (_Rule(32, (4, 16, 2), num_warps=2, maxnreg=128), _Rule(_ANY, (4, 16, 2))),
    (pool, 8, False): (_Rule(64, (8, 8, 4)), _Rule(_ANY, (8, 8, 4), maxnreg=168, tail=True)),
    (grad_queries, 16, True): (
        _Rule(16, (4, 16, 2), num_warps=2, maxnreg=128), _Rule(64, (8, 16, 2), maxnreg=128),
        _Rule(_ANY, (4, 16, 4), maxnreg=128)),
    (grad_queries, 16, False): (
        _Rule(16, (4, 16, 2), num_warps=2, maxnreg=128), _Rule(32, (4, 16, 4), maxnreg=128),
        _Rule(_ANY, (8, 16, 4))),
    (grad_queries, 8, False): (
        _Rule(64, (8, 8, 8), tail=True), _Rule(_ANY, (8, 8, 4), maxnreg=128, tail=True)),
    (grad_keys, 16, True): (
        _Rule(16, (4, 16, 2), num_warps=2, maxnreg=128), _Rule(32, (8, 16, 1), maxnreg=128, prefetch=True),
        _Rule(64, (4, 16, 2), maxnreg=128), _Rule(_ANY, (4, 16, 2), 128, maxnreg=168)),
    (grad_keys, 16, False): (
        _Rule(16, (4, 16, 2), num_warps=2, maxnreg=128), _Rule(64, (4, 16, 2), maxnreg=128),
        _Rule(_ANY, (4, 16, 2), 128, maxnreg=168)),
    (grad_keys, 8, False): (_Rule(64, (8, 8, 4)), _Rule(_ANY, (8, 8, 4), 128, maxnreg=168)),
}


def _split_channels(channels: int, widest: int, tail: bool) -> tuple[int, int]:
    """Channels of a block and of the rest that the same program takes: 96 = 64 + 32, 768 = 12 * 64 + 0."""
    for block in (32, 64) if tail else ():
        rest = channels - block
        if block <= widest and 16 <= rest < block and rest == triton.next_power_of_2(rest):
            return block, rest
    return min(max(16, triton.next_power_of_2(channels)), widest), 0


def choose_config(kernel: Any, height: int, width: int, channels: int, dtype: torch.dtype) -> Config:
    """The configuration for maps of so many pixels and channels per group; fixed, so that results never vary.

    Chosen by time on an H200. Some spill a few registers, and are faster for the programs that then share a
    multiprocessor. Loops are never pipelined (`num_stages`): Triton 3.6 made a race of it, seen in results that
    differed from run to run.
    """
    block = block_width(width)
    if dtype == torch.float32:
        return Config(64 // block, block, 32 // block, *_split_channels(channels, 32, kernel is not grad_keys))
    # Maps with blocks of 8 columns that are read whole have no rules of their own.
    rules = _RULES[kernel, block, block == 16 and height * width <= WHOLE_UP_TO]
    rule = next(rule for rule in rules if channels <= rule.channels)
    return Config(*rule.tile, *_split_channels(channels, rule.widest, rule.tail), rule.num_warps, rule.maxnreg,
                  rule.prefetch)


def needs_wide_index(*maps: tuple[Sequence[int], Sequence[int]]) -> bool:
    """Whether offsets within an image exceed 32 bits, of maps given by their sizes and strides."""
    return any(sum((n - 1) * s for n, s in zip(size[1:], stride[1:], strict=True)) + 16 * max(stride[2:]) >= 2 ** 31
               for size, stride in maps)


class Launch:
    """A kernel with its grid and all arguments but the tensors.

    Triton sorts the arguments of every launch anew, which for so many takes longer than a small kernel runs. What it
    made of them at the first launch is kept, and called directly from then on.
    """

    def __init__(self, kernel: Any, grid: int, numbers: tuple[Any, ...], constants: dict[str, Any]):
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self._compiled: Callable[..., None] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        # Kernels are compiled for addresses that are multiples of 16, or for any.
        aligned = not any(t.data_ptr() % 16 for t in tensors)
        if self._compiled is not None and aligned:
            self._compiled(*tensors, *self._rest)
            return
        compiled = self.kernel[(self.grid,)](*tensors, *self.numbers, **self.constants)
        if aligned and tensors[0].is_cuda:
            given = len(tensors) + len(self.numbers)
            self._rest = *self.numbers, *(self.constants[name] for name in self.kernel.arg_names[given:])
            self._compiled = compiled[(self.grid, 1, 1)]


def start(kernel: Any, grid: int, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], **constants: Any) -> None:
    """Launches `grid` programs of a kernel; `constants` are its compile-time arguments and launch options."""
    compiled_for = tensors[0].device, *(t.dtype for t in tensors)
    _launch(kernel, grid, numbers, tuple(constants.items()), compiled_for)(*tensors)


@functools.lru_cache(1024)
def _launch(
        kernel: Any, grid: int, numbers: tuple[Any, ...], constants: tuple[tuple[str, Any], ...],
        compiled_for: tuple[Any, ...]) -> Launch:
    return Launch(kernel, grid, numbers, dict(constants))


class Form(NamedTuple):
    """What tells one call from another apart from values: calls of one form launch the same programs."""
    x: tuple[int, ...]
    sigma: tuple[int, ...]
    groups: int
    stride: int
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, stride: int, x: Tensor, weight_logits: Tensor, sigma: Tensor, *more: Tensor) -> 'Form':
        """`more`: further maps of features that kernels read or write."""
        return cls(x.shape, sigma.shape, weight_logits.shape[1], stride,
                   (x.stride(), weight_logits.stride(), sigma.stride(), *(t.stride() for t in more)),
                   (x.dtype, weight_logits.dtype, sigma.dtype), x.device)

    @property
    def channels(self) -> int:
        """Of a group."""
        return self.x[1] // self.groups

    @property
    def planes(self) -> int:
        """Images times groups."""
        return self.x[0] * self.groups

    @property
    def sizes(self) -> tuple[int, ...]:
        """What every kernel is told of them."""
        return *self.x[2:], *self.sigma[2:], self.groups

    @property
    def kept(self) -> Kept:
        """Of a plane, for the backward pass."""
        return Kept.of(*self.x[2:], *self.sigma[2:])

    def constants(self, kernel: Any, config: Config, **more: Any) -> dict[str, Any]:
        """Compile-time arguments that the kernels share, and launch options."""
        height, width = self.x[2:]
        xw = block_width(width)
        if config.maxnreg is not None:
            more['maxnreg'] = config.maxnreg
        return {
            'CHANNELS': self.channels, 'BLOCK_C': config.block_c,
            **({} if kernel is grad_keys else {'TAIL': config.tail}),
            **({} if kernel is grad_queries else {'PREFETCH': config.prefetch}),
            'TILE_H': config.tile_h, 'TILE_W': config.tile_w, 'CHUNK': config.chunk,
            'XW': xw, 'X_BLOCKS': -(-width // xw), 'WHOLE': height * width <= WHOLE_UP_TO, 'STRIDE': self.stride,
            'PRECISION': 'tf32x3' if self.dtypes[0] == torch.float32 else 'ieee',
            'num_warps': config.num_warps, 'num_stages': 1, **more}


def _channel_blocks(config: Config, channels: int) -> int:
    return 1 if config.tail else -(-channels // config.block_c)


def _tiles(config: Config, height: int, width: int, xw: int) -> int:
    return -(-height // config.tile_h) * -(-round_up(width, xw) // config.tile_w)


def on_device(x: Tensor) -> Any:
    """The device that kernels for `x` are launched on."""
    context: Callable[..., Any] = torch.cuda.device if x.is_cuda else contextlib.nullcontext
    return context(x.device)


@functools.lru_cache(1024)
def _forward_launches(form: Form) -> tuple[Launch, Launch, int]:
    """`prepare` and `pool`, and how much they keep of a plane."""
    (height, width), (_, support_groups, out_height, out_width) = form.x[2:], form.sigma
    of_x, of_logits, of_sigma, of_y = form.strides
    dtype, xw, kept_size = form.dtypes[0], block_width(width), form.kept.size
    shift = SHIFT_FORWARD[dtype]
    block = min(1024, triton.next_power_of_2(max(round_up(height, 16), round_up(out_height, 16)) * 16))
    prepares = Launch(
        prepare, form.planes,
        (*of_logits, *of_sigma, *form.sizes, form.groups // support_groups, kept_size, math.log(TOLERANCE[dtype]),
         LIMIT[dtype], shift),
        {'XW': xw, 'BLOCK': block, 'STRIDE': form.stride, 'num_warps': max(1, min(8, block // 128))})
    config = choose_config(pool, out_height, out_width, form.channels, dtype)
    wide = needs_wide_index((form.x, of_x), ((*form.x[:2], out_height, out_width), of_y))
    pools = Launch(
        pool, form.planes * _tiles(config, out_height, out_width, xw) * _channel_blocks(config, form.channels),
        (*of_x, *of_y, *form.sizes, kept_size, shift),
        form.constants(pool, config, INDEX=tl.int64 if wide else tl.int32))
    return prepares, pools, kept_size


@functools.lru_cache(1024)
def _backward_launches(form: Form) -> tuple[Launch, Launch, int, int]:
    """`grad_queries` and `grad_keys`; cells of a plane of queries, and parts in which gradients of logits come."""
    (height, width), (_, support_groups, out_height, out_width) = form.x[2:], form.sigma
    of_x, _, of_sigma, of_grad, of_dx = form.strides
    dtype, xw, kept_size, planes = form.dtypes[0], block_width(width), form.kept.size, form.planes
    of_queries = choose_config(grad_queries, out_height, out_width, form.channels, dtype)
    of_keys = choose_config(grad_keys, height, width, form.channels, dtype)
    parts = _channel_blocks(of_keys, form.channels)
    wide = needs_wide_index((form.x, of_x), ((*form.x[:2], out_height, out_width), of_grad), (form.x, of_dx))
    index = tl.int64 if wide else tl.int32
    queries = Launch(
        grad_queries, planes * _tiles(of_queries, out_height, out_width, xw),
        (*of_grad, *of_x, *of_sigma, *form.sizes, form.groups // support_groups, kept_size),
        form.constants(grad_queries, of_queries, INDEX=index))
    keys = Launch(
        grad_keys, planes * _tiles(of_keys, height, width, xw) * parts,
        (*of_grad, *of_x, *of_dx, *form.sizes, kept_size, planes),
        form.constants(grad_keys, of_keys, INDEX=index, Q_BLOCKS=-(-out_width // xw),
                       ROWS=triton.next_power_of_2(out_height), SHIFT=SHIFT_BACKWARD[dtype]))
    return queries, keys, round_up(out_height, 16) * round_up(out_width, xw), parts


def forget_launches() -> None:
    """Chooses and compiles anew from now on, where something that this module reads was replaced."""
    _forward_launches.cache_clear()
    _backward_launches.cache_clear()
    _launch.cache_clear()


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
    y = empty_maps(x, (*x.shape[:2], *sigma.shape[2:]), is_channels_last(x, 1)) if out is None else out
    form = Form.of(stride, x, weight_logits, sigma, y)
    prepares, pools, kept_size = _forward_launches(form)
    kept = x.new_empty(form.planes, kept_size, dtype=torch.float32)
    if x.numel():
        with on_device(x):
            prepares(weight_logits, sigma, kept)
            pools(x, y, kept)
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
    if dx is None:
        dx = empty_maps(x, x.shape, is_channels_last(x, 1))
    if not x.numel():
        return dx, weight_logits.new_zeros(weight_logits.shape), sigma.new_zeros(sigma.shape)
    grad = grad.to(x.dtype)
    queries, keys, cells, parts = _backward_launches(Form.of(stride, x, weight_logits, sigma, grad, dx))
    (b, groups), (support_groups, *out_size) = weight_logits.shape[:2], sigma.shape[1:]
    shared = groups // support_groups
    sums = kept.new_empty(kept.shape[0], 2 * cells)
    dsigma = sigma.new_empty(b, groups, *out_size, dtype=sigma.dtype if shared == 1 else torch.float32)
    dlogits = (weight_logits.new_empty(weight_logits.shape) if parts == 1
               else kept.new_empty(parts, *weight_logits.shape))
    with on_device(x):
        queries(grad, x, kept, sums, sigma, dsigma)
        keys(grad, x, dx, kept, sums, dlogits)
    if shared > 1:
        dsigma = dsigma.view(b, support_groups, shared, *out_size).sum(2).to(sigma.dtype)
    if parts > 1:
        dlogits = dlogits.sum(0).to(weight_logits.dtype)
    return dx, dlogits, dsigma
