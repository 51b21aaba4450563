"""Weight logits and supports from the output of a predictor: one operator with its own derivative."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import runs_triton
from .checks import why_not_differentiable
from .layout import empty_maps, is_channels_last

_lib = torch.library.Library('cpool_vision', 'FRAGMENT')

_ARGUMENTS = 'int groups, int support_groups, int stride, float bound, float ratio, float floor'
_lib.define(f'supports_and_logits(Tensor raw, {_ARGUMENTS}) -> (Tensor, Tensor)')
_lib.define(f'supports_and_logits_fused(Tensor raw, {_ARGUMENTS}) -> (Tensor, Tensor)')
_lib.define(
    'supports_and_logits_fused_backward(Tensor grad_logits, Tensor grad_sigma, Tensor weight_logits, Tensor sigma, '
    'int rows, bool channels_last, ScalarType dtype, int stride, float bound, float ratio, float floor) -> Tensor')


def check_raw(raw: Tensor, groups: int, support_groups: int, stride: int) -> None:
    """Raises unless `raw` has rows for so many groups.

    Raises:
        TypeError: it is not floating point.
        ValueError: wrong rank, too few rows, or `stride < 1`.
    """
    if not raw.is_floating_point():
        raise TypeError(f'raw must be floating point, got {raw.dtype}; convert it, e.g. raw.float()')
    if raw.ndim != 4 or raw.shape[1] < groups + support_groups:
        raise ValueError(f'raw must have shape (B, {groups + support_groups} or more, H, W) for {groups} groups and '
                         f'{support_groups} of supports, got {tuple(raw.shape)}')
    if stride < 1:
        raise ValueError(f'stride must be >= 1, got {stride=}')


def map_dtype(raw: Tensor) -> torch.dtype:
    """Of the maps: that of `raw`, at least fp32."""
    return torch.promote_types(raw.dtype, torch.float32)


def largest_support(raw: Tensor, ratio: float) -> Any:
    """`ratio sqrt(H W)` in pixels of the map `raw`. A power, for which symbolic sizes and traces have a rule."""
    return ratio * (raw.shape[-2] * raw.shape[-1]) ** 0.5


def make_maps(
        raw: Tensor, groups: int, support_groups: int, stride: int, bound: float, ratio: float, floor: float,
) -> tuple[Tensor, Tensor]:
    """Weight logits `bound * tanh(l / bound)` and supports `floor + ratio sqrt(H W) sigmoid(s)` in pixels, at least
    fp32, from `raw` `(B, K, H, W)`: `groups` rows of l, `support_groups` of s, of which every `stride`-th pixel counts.

    Differentiable by autograd to any order. A `bound` of 0 leaves the logits as they are.

    Returns:
        `(B, groups, H, W)` and `(B, support_groups, ceil(H / stride), ceil(W / stride))`.
    """
    check_raw(raw, groups, support_groups, stride)
    dtype = map_dtype(raw)
    weight_logits = raw[:, :groups].to(dtype)
    if bound > 0:
        weight_logits = bound * (weight_logits / bound).tanh()
    supports = raw[:, groups:groups + support_groups, ::stride, ::stride].to(dtype)
    return weight_logits, floor + largest_support(raw, ratio) * supports.sigmoid()


def make_maps_backward(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, rows: int, channels_last: bool,
        dtype: torch.dtype, stride: int, bound: float, ratio: float, floor: float) -> Tensor:
    """Gradient `(B, rows, H, W)` of what `make_maps` read, from its outputs. Differentiable itself."""
    if bound > 0:
        grad_logits = grad_logits * (1 - (weight_logits / bound).square())
    largest = largest_support(weight_logits, ratio)
    share = (sigma - floor) / largest
    of_cells = grad_sigma * (share * (1 - share) * largest)
    grad_supports = of_cells
    if stride > 1:
        grad_supports = of_cells.new_zeros(*of_cells.shape[:2], *weight_logits.shape[2:])
        grad_supports[..., ::stride, ::stride] = of_cells
    b, groups, h, w = weight_logits.shape
    rest = of_cells.new_zeros(b, rows - groups - sigma.shape[1], h, w)
    grad = torch.cat([grad_logits, grad_supports, rest], 1).to(dtype)
    return grad.contiguous(memory_format=torch.channels_last) if channels_last else grad


def _supports_and_logits(*args: Any) -> tuple[Tensor, Tensor]:
    """What is traced, transformed or of another kind is left to torch's own operators, which compilers fuse."""
    raw = args[0]
    if type(raw) is Tensor and not torch.jit.is_tracing() and why_not_differentiable(raw) is None:
        return torch.ops.cpool_vision.supports_and_logits_fused.default(*args)
    return make_maps(*args)


def _vmap(info: Any, in_dims: tuple[int | None, ...], raw: Tensor, *args: Any) -> tuple[tuple[Tensor, Tensor], Any]:
    """`torch.func.vmap`: the mapped axis joins the batch."""
    raw = raw.movedim(in_dims[0] or 0, 0)
    maps = torch.ops.cpool_vision.supports_and_logits(raw.flatten(0, 1), *args)
    return tuple(t.unflatten(0, raw.shape[:2]) for t in maps), (0, 0)


def make_fused_maps(
        raw: Tensor, groups: int, support_groups: int, stride: int, bound: float, ratio: float, floor: float,
) -> tuple[Tensor, Tensor]:
    """`make_maps` in one pass where Triton's kernels run, else in place; not differentiable by autograd."""
    weight_logits, sigma = _fused_fake(raw, groups, support_groups, stride)
    largest = largest_support(raw, ratio)
    if runs_triton(raw):
        from .triton.maps import fill_maps
        fill_maps(raw, weight_logits, sigma, stride, bound, largest, floor)
        return weight_logits, sigma
    weight_logits.copy_(raw[:, :groups])
    sigma.copy_(raw[:, groups:groups + support_groups, ::stride, ::stride])
    if bound > 0:
        weight_logits.div_(bound).tanh_().mul_(bound)
    return weight_logits, sigma.sigmoid_().mul_(largest).add_(floor)


def empty_pair(
        like: Tensor, batch: int, height: int, width: int, groups: int, support_groups: int, stride: int,
) -> tuple[Tensor, Tensor]:
    """Uninitialized logits and supports for a map of so many pixels, on the device of `like`, at least in fp32."""
    dtype = map_dtype(like)
    out = (height + stride - 1) // stride, (width + stride - 1) // stride
    return (like.new_empty((batch, groups, height, width), dtype=dtype),
            like.new_empty((batch, support_groups, *out), dtype=dtype))


def _fused_fake(
        raw: Tensor, groups: int, support_groups: int, stride: int, *how: Any) -> tuple[Tensor, Tensor]:
    check_raw(raw, groups, support_groups, stride)
    return empty_pair(raw, raw.shape[0], raw.shape[2], raw.shape[3], groups, support_groups, stride)


def make_fused_maps_backward(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, rows: int, channels_last: bool,
        dtype: torch.dtype, stride: int, bound: float, ratio: float, floor: float) -> Tensor:
    """`make_maps_backward` in one pass where Triton's kernels run."""
    grad = _fused_backward_fake(grad_logits, grad_sigma, weight_logits, sigma, rows, channels_last, dtype)
    if runs_triton(grad):
        from .triton.maps import fill_gradient
        largest = largest_support(weight_logits, ratio)
        fill_gradient(grad_logits, grad_sigma, weight_logits, sigma, grad, stride, bound, largest, floor)
        return grad
    return grad.copy_(make_maps_backward(
        grad_logits, grad_sigma, weight_logits, sigma, rows, channels_last, dtype, stride, bound, ratio, floor))


def _fused_backward_fake(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, rows: int, channels_last: bool,
        dtype: torch.dtype, *how: Any) -> Tensor:
    b, _, h, w = weight_logits.shape
    return empty_maps(weight_logits, (b, rows, h, w), channels_last, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    raw, _, _, *how = inputs
    ctx.how = how
    ctx.like = raw.shape[1], is_channels_last(raw, 1), raw.dtype
    ctx.save_for_backward(*output)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    run: Callable[..., Tensor] = torch.ops.cpool_vision.supports_and_logits_fused_backward.default
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        run = make_maps_backward
    return run(*grads, *ctx.saved_tensors, *ctx.like, *ctx.how), *(None,) * 6


_lib.impl('supports_and_logits', _supports_and_logits, 'CompositeImplicitAutograd')
_lib.impl('supports_and_logits_fused', make_fused_maps, 'CompositeExplicitAutograd')
_lib.impl('supports_and_logits_fused_backward', make_fused_maps_backward, 'CompositeExplicitAutograd')
torch.library.register_vmap('cpool_vision::supports_and_logits', _vmap, lib=_lib)
torch.library.register_fake('cpool_vision::supports_and_logits_fused', _fused_fake, lib=_lib)
torch.library.register_fake('cpool_vision::supports_and_logits_fused_backward', _fused_backward_fake, lib=_lib)
torch.library.register_autograd(
    'cpool_vision::supports_and_logits_fused', _backward, setup_context=_setup_context, lib=_lib)
