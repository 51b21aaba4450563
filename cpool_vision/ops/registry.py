"""Schemas, kernels, fakes, autograd and FLOP formulas of the operators under `torch.ops.cpool_vision`.

`context_pool2d` chooses a backend and decomposes; models call it in this form, which TorchScript, `torch.fx`,
`torch.compile` and `torch.export` all take as one operator. `to_autocast` is its input, under autocast in the autocast
dtype: a cast that the predictor and the pool share.
"""
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import register_autocast, without_autocast
from .backends import choose_backend
from .checks import check_arguments, check_gradient, refuse_tangents
from .layout import empty_maps, is_channels_last
from .native import native_backward, native_forward
from .reference import context_pool2d_reference
from .tiled import tiled_backward, tiled_forward
from .tokens import backward_on_tokens, context_pool_tokens, empty_tokens, grid_map, on_tokens
from .triton.layout import Kept

_lib = torch.library.Library('cpool_vision', 'DEF')

_lib.define(
    'context_pool2d(Tensor x, Tensor weight_logits, Tensor sigma, int stride=1, str? backend=None, '
    'Tensor? offset=None) -> Tensor')
_lib.define(
    'context_pool2d_reference(Tensor x, Tensor weight_logits, Tensor sigma, int stride=1, '
    'Tensor? offset=None) -> Tensor')
_lib.define(
    'context_pool_tokens(Tensor x, Tensor weight_logits, Tensor sigma, int num_prefix_tokens, str? backend=None, '
    'Tensor? offset=None) -> Tensor')
_lib.define('to_autocast(Tensor(a) x) -> Tensor(a)')
for _backend, _outputs in (('native', 'Tensor'), ('triton', '(Tensor, Tensor)')):
    _lib.define(
        f'context_pool_tokens_{_backend}(Tensor x, Tensor weight_logits, Tensor sigma, int num_prefix_tokens) '
        f'-> {_outputs}')
    _lib.define(
        f'context_pool_tokens_{_backend}_backward(Tensor grad, Tensor x, Tensor weight_logits, Tensor sigma, '
        f"{'Tensor kept, ' if _backend == 'triton' else ''}int num_prefix_tokens) -> (Tensor, Tensor, Tensor)")
_lib.define(
    'context_pool2d_tiled(Tensor x, Tensor weight_logits, Tensor sigma, int stride, Tensor? offset=None) '
    '-> (Tensor, Tensor)')
_lib.define(
    'context_pool2d_tiled_backward(Tensor grad, Tensor x, Tensor weight_logits, Tensor sigma, Tensor margins, '
    'int stride, Tensor? offset=None) -> (Tensor, Tensor, Tensor, Tensor)')
_lib.define('context_pool2d_native(Tensor x, Tensor weight_logits, Tensor sigma, int stride) -> Tensor')
_lib.define(
    'context_pool2d_native_backward(Tensor grad, Tensor x, Tensor weight_logits, Tensor sigma, int stride) '
    '-> (Tensor, Tensor, Tensor)')
_lib.define(
    'context_pool2d_triton(Tensor x, Tensor weight_logits, Tensor sigma, int stride) -> (Tensor, Tensor)')
_lib.define(
    'context_pool2d_triton_backward(Tensor grad, Tensor x, Tensor weight_logits, Tensor sigma, Tensor kept, '
    'int stride) -> (Tensor, Tensor, Tensor)')


def _context_pool2d(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1, backend: str | None = None,
        offset: Tensor | None = None) -> Tensor:
    check_arguments(x, weight_logits, sigma, stride, offset)
    chosen = choose_backend(x, weight_logits, sigma, stride, offset, backend)
    if chosen == 'reference':
        return torch.ops.cpool_vision.context_pool2d_reference(x, weight_logits, sigma, stride, offset)
    if chosen == 'native':
        return torch.ops.cpool_vision.context_pool2d_native.default(x, weight_logits, sigma, stride)
    if chosen == 'triton':
        return torch.ops.cpool_vision.context_pool2d_triton.default(x, weight_logits, sigma, stride)[0]
    return torch.ops.cpool_vision.context_pool2d_tiled.default(x, weight_logits, sigma, stride, offset)[0]


def _vmap(
        run: Callable[..., Tensor], info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight_logits: Tensor,
        sigma: Tensor, number: int = 1, backend: str | None = None, offset: Tensor | None = None,
) -> tuple[Tensor, int]:
    """`torch.func.vmap` of `run`: the mapped axis joins the batch."""
    def front(t: Tensor, dim: int | None) -> Tensor:
        return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

    mapped = [front(t, dim) for t, dim in zip((x, weight_logits, sigma), in_dims[:3], strict=True)]
    if offset is not None:
        offset = front(offset, in_dims[5]).expand(-1, mapped[0].shape[1], -1, -1, -1, -1).flatten(0, 1)
    y = run(*(t.flatten(0, 1) for t in mapped), number, backend, offset)
    return y.unflatten(0, mapped[0].shape[:2]), 0


def _tiled_backward(*args: Any) -> tuple[Tensor, ...]:
    *grads, doffset = tiled_backward(*args)
    # An operator returns tensors only.
    return *grads, args[0].new_empty(0) if doffset is None else doffset


def _triton_forward(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, out: Tensor | None = None) -> tuple[Tensor, ...]:
    check_arguments(x, weight_logits, sigma, stride)
    from .triton.launch import triton_forward
    return triton_forward(x, weight_logits, sigma, stride, out)


def _triton_backward(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, kept: Tensor, stride: int,
        dx: Tensor | None = None) -> tuple[Tensor, ...]:
    check_arguments(x, weight_logits, sigma, stride)
    check_gradient(grad, x, sigma)
    from .triton.launch import triton_backward
    return triton_backward(grad, x, weight_logits, sigma, kept, stride, dx)


def _entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Plain tensors without tangents for an implementation.

    A subclass whose methods wrap what they return would make the outputs views, which no one may change in place; and
    a tangent would be dropped without a word.
    """
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        refuse_tangents(args)
        return function(*(
            arg.as_subclass(Tensor) if isinstance(arg, Tensor) and type(arg) is not Tensor else arg for arg in args))
    return wrapper


_composites: tuple[tuple[str, Callable[..., Any]], ...] = (
    ('context_pool2d', _context_pool2d),
    ('context_pool2d_reference', without_autocast(context_pool2d_reference)),
    ('context_pool_tokens', context_pool_tokens),
    ('to_autocast', lambda x: x),
)
for _name, _function in _composites:
    _lib.impl(_name, _function, 'CompositeImplicitAutograd')
for _name in ('context_pool2d', 'context_pool_tokens'):
    torch.library.register_vmap(
        f'cpool_vision::{_name}', functools.partial(_vmap, getattr(torch.ops.cpool_vision, _name)), lib=_lib)
# Under torch.func.vmap torch's own operators know no autocast either.
torch.library.register_vmap('cpool_vision::to_autocast', lambda info, dims, x: (x, dims[0]), lib=_lib)
for _name, _function, _key in (
        ('2d_tiled', without_autocast(tiled_forward), 'CompositeExplicitAutograd'),
        ('2d_tiled_backward', without_autocast(_tiled_backward), 'CompositeExplicitAutograd'),
        ('2d_native', native_forward, 'CPU'),
        ('2d_native_backward', native_backward, 'CPU'),
        ('2d_triton', _triton_forward, 'CompositeExplicitAutograd'),
        ('2d_triton_backward', _triton_backward, 'CompositeExplicitAutograd'),
        ('_tokens_native', on_tokens(native_forward), 'CPU'),
        ('_tokens_native_backward', backward_on_tokens(native_backward), 'CPU'),
        ('_tokens_triton', on_tokens(_triton_forward), 'CompositeExplicitAutograd'),
        ('_tokens_triton_backward', backward_on_tokens(_triton_backward), 'CompositeExplicitAutograd'),
):
    _lib.impl(f'context_pool{_name}', _entry(_function), _key)


register_autocast(_lib, 'context_pool2d', torch.ops.cpool_vision.context_pool2d.default)
register_autocast(_lib, 'context_pool_tokens', torch.ops.cpool_vision.context_pool_tokens.default)
register_autocast(_lib, 'to_autocast', torch.ops.cpool_vision.to_autocast.default)


def _tiled_fake(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_arguments(x, weight_logits, sigma, stride, offset)
    g, ho, wo = weight_logits.shape[1], *sigma.shape[2:]
    return (
        empty_maps(x, (x.shape[0], x.shape[1], ho, wo), is_channels_last(x, g)),
        x.new_empty(4, x.shape[0] * g, ho, wo, dtype=torch.int16),
    )


def _native_fake(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> Tensor:
    check_arguments(x, weight_logits, sigma, stride)
    return empty_maps(x, (*x.shape[:2], *sigma.shape[2:]), is_channels_last(x, 1))


def _triton_fake(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    check_arguments(x, weight_logits, sigma, stride)
    b, c, h, w = x.shape
    out = sigma.shape[2:]
    kept = x.new_empty(b * weight_logits.shape[1], Kept.of(h, w, *out).size, dtype=torch.float32)
    return empty_maps(x, (b, c, *out), is_channels_last(x, 1)), kept


def _tiled_backward_fake(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, margins: Tensor, stride: int,
        offset: Tensor | None = None) -> tuple[Tensor, ...]:
    grads = _gradients_like(grad, x, weight_logits, sigma, stride, is_channels_last(x, weight_logits.shape[1]))
    return *grads, grad.new_empty(0) if offset is None else offset.new_empty(offset.shape)


def _kernel_backward_fake(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _gradients_like(grad, x, weight_logits, sigma, args[-1], is_channels_last(x, 1))


def _gradients_like(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, channels_last: bool,
) -> tuple[Tensor, ...]:
    check_arguments(x, weight_logits, sigma, stride)
    check_gradient(grad, x, sigma)
    return (
        empty_maps(x, x.shape, channels_last),
        weight_logits.new_empty(weight_logits.shape),
        sigma.new_empty(sigma.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    x, weight_logits, sigma, ctx.stride, *offset = inputs
    aside = () if isinstance(output, Tensor) else output[1:]
    ctx.save_for_backward(*offset, x, weight_logits, sigma, *aside)
    ctx.mark_non_differentiable(*aside)
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be written
    ctx.optional = len(offset)


def _register_autograd(form: str, backend: str, fake: Callable[..., Any], backward_fake: Callable[..., Any]) -> None:
    name = f'cpool_vision::{form}_{backend}'
    run_backward = getattr(torch.ops.cpool_vision, f'{form}_{backend}_backward').default

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors  # which checkpointing lets be read but once
        offset, saved = kept[:ctx.optional], kept[ctx.optional:]
        grads = list(run_backward(grad, *saved, ctx.stride, *offset))
        grads.insert(3, None)
        # An offset that the caller left out is not an input.
        return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False))

    def no_double_backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"backend='{backend}' has no second derivative; "
            "use backend='reference' where gradients of gradients are needed")

    torch.library.register_fake(name, fake, lib=_lib)
    torch.library.register_fake(f'{name}_backward', backward_fake, lib=_lib)
    torch.library.register_autograd(name, backward, setup_context=_setup_context, lib=_lib)
    torch.library.register_autograd(f'{name}_backward', no_double_backward, lib=_lib)


def _tokens_fake(backend_fake: Callable[..., Any]) -> Callable[..., Any]:
    def fake(x: Tensor, weight_logits: Tensor, sigma: Tensor, num_prefix_tokens: int) -> Any:
        result = backend_fake(grid_map(x, num_prefix_tokens, weight_logits), weight_logits, sigma, 1)
        y = empty_tokens(x, num_prefix_tokens)
        return y if isinstance(result, Tensor) else (y, *result[1:])
    return fake


def _tokens_backward_fake(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, *args: Any) -> tuple[Tensor, ...]:
    maps = (grid_map(t, args[-1], weight_logits) for t in (grad, x))
    return empty_tokens(grad.to(x.dtype), args[-1]), *_kernel_backward_fake(*maps, weight_logits, sigma, 1)[1:]


_register_autograd('context_pool2d', 'tiled', _tiled_fake, _tiled_backward_fake)
_register_autograd('context_pool2d', 'native', _native_fake, _kernel_backward_fake)
_register_autograd('context_pool2d', 'triton', _triton_fake, _kernel_backward_fake)
_register_autograd('context_pool_tokens', 'native', _tokens_fake(_native_fake), _tokens_backward_fake)
_register_autograd('context_pool_tokens', 'triton', _tokens_fake(_triton_fake), _tokens_backward_fake)


def _pair_flops(x_shape: Sequence[int], sigma_shape: Sequence[int]) -> int:
    return 2 * math.prod(x_shape) * math.prod(sigma_shape[2:])


@register_flop_formula([
    torch.ops.cpool_vision.context_pool2d_tiled, torch.ops.cpool_vision.context_pool2d_native,
    torch.ops.cpool_vision.context_pool2d_triton])
def _forward_flops(
        x_shape: Sequence[int], logits_shape: Sequence[int], sigma_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """The dense definition's product, an upper bound: what is skipped depends on the supports, not on shapes."""
    return _pair_flops(x_shape, sigma_shape)


@register_flop_formula([
    torch.ops.cpool_vision.context_pool2d_tiled_backward, torch.ops.cpool_vision.context_pool2d_native_backward,
    torch.ops.cpool_vision.context_pool2d_triton_backward])
def _backward_flops(
        grad_shape: Sequence[int], x_shape: Sequence[int], logits_shape: Sequence[int], sigma_shape: Sequence[int],
        *_: Any, **__: Any) -> int:
    return 2 * _pair_flops(x_shape, sigma_shape)


@register_flop_formula([
    torch.ops.cpool_vision.context_pool_tokens_native, torch.ops.cpool_vision.context_pool_tokens_triton])
def _tokens_flops(
        x_shape: Sequence[int], logits_shape: Sequence[int], sigma_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return _pair_flops((x_shape[0], x_shape[2], *sigma_shape[2:]), sigma_shape)


@register_flop_formula([
    torch.ops.cpool_vision.context_pool_tokens_native_backward,
    torch.ops.cpool_vision.context_pool_tokens_triton_backward])
def _tokens_backward_flops(grad_shape: Sequence[int], *shapes: Sequence[int], **_: Any) -> int:
    return 2 * _tokens_flops(*shapes[:3])
