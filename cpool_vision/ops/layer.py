"""The whole layer, predictor, pool and gate, as one operator: gradients of the features meet in one tensor."""
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import without_autocast
from .backends import choose_backend, runs_triton
from .native import native_backward, native_forward
from .predictor import (
    WEIGHTS,
    add_product,
    hidden_gradients,
    may_fuse,
    predict_with_hidden,
    reduce_gradient,
)
from .tokens import WRITE_TOKENS, as_tokens, backward_on_tokens, on_tokens

_lib = torch.library.Library('cpool_vision', 'FRAGMENT')

_HOW = (
    'int num_prefix_tokens, SymInt height, SymInt width, int groups, int support_groups, int stride, float bound, '
    'float ratio, float floor')
# TorchScript types every bias as optional.
_lib.define(
    'context_pool_layer(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor predict_weight, '
    f'Tensor? predict_bias, Tensor? gamma, Tensor? base, {_HOW}, str? backend=None) -> Tensor')
_lib.define(
    f'context_pool_layer_fused(Tensor x, {WEIGHTS}, Tensor? gamma, Tensor? base, {_HOW}, str backend) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)')
_lib.define(
    'context_pool_layer_fused_backward(Tensor grad, Tensor weight_logits, Tensor sigma, Tensor hidden, Tensor kept, '
    f'Tensor x, {WEIGHTS}, Tensor? gamma, Tensor? base, int num_prefix_tokens, int stride, float bound, float ratio, '
    'float floor, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')
# Tensors among the arguments; further ones say how.
_TENSORS = 7


def _gate_of(gamma: Tensor, like: Tensor) -> Tensor:
    """The gate `(C,)` in the dtype of `like`, a map or tokens, to multiply it by."""
    gamma = gamma.to(like.dtype)
    return gamma.view(-1, 1, 1) if like.ndim == 4 else gamma


def compose_layer(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, predict_weight: Tensor,
        predict_bias: Tensor | None, gamma: Tensor | None, base: Tensor | None, num_prefix_tokens: int, height: int,
        width: int, groups: int, support_groups: int, stride: int, bound: float, ratio: float, floor: float,
        backend: str | None = None) -> Tensor:
    """A map `(B, C, H, W)`, or tokens `(B, P + H * W, C)` at stride 1, pooled with maps that it predicts.

    By one operator for the maps, and one for the pool; with a gate `gamma` `(C,)` the output is
    `base + gamma * (pool - base)` in the dtype of `base`, which is `x` if None.
    """
    weight_logits, sigma = torch.ops.cpool_vision.predict_maps(
        as_tokens(x), reduce_weight, reduce_bias, predict_weight, predict_bias, height, width, groups, support_groups,
        stride, bound, ratio, floor)
    if x.ndim == 4:
        y = torch.ops.cpool_vision.context_pool2d(x, weight_logits, sigma, stride, backend)
    else:
        y = torch.ops.cpool_vision.context_pool_tokens(x, weight_logits, sigma, num_prefix_tokens, backend)
    if gamma is None:
        return y
    base = x if base is None else base
    return torch.lerp(base, y.type_as(base), _gate_of(gamma, base))


def _chosen(x: Tensor, stride: int, backend: str | None, *weights: Tensor | None) -> str | None:
    """The backend whose kernels read and write tokens like `x`, or None where one operator cannot do it all."""
    predict_weight, *biases = weights
    if predict_weight is None or not may_fuse(x, predict_weight, *biases) or not x.numel():
        return None
    chosen = choose_backend(x, x, x, stride, None, backend)
    return chosen if chosen in WRITE_TOKENS and runs_triton(x) == (chosen == 'triton') else None


def _context_pool_layer(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, predict_weight: Tensor,
        predict_bias: Tensor | None, gamma: Tensor | None, base: Tensor | None, num_prefix_tokens: int, height: int,
        width: int, groups: int, support_groups: int, stride: int, bound: float, ratio: float, floor: float,
        backend: str | None = None) -> Tensor:
    """What is traced, transformed or of another kind is left to the operators of which it is made."""
    if base is x:
        base = None
    args = (x, reduce_weight, reduce_bias, predict_weight, predict_bias, gamma, base, num_prefix_tokens, height, width,
            groups, support_groups, stride, bound, ratio, floor)
    chosen = _chosen(x, stride, backend, predict_weight, reduce_bias, predict_bias)
    if chosen is None:
        return compose_layer(*args, backend)
    return torch.ops.cpool_vision.context_pool_layer_fused.default(*args, chosen)[0]


def _runs(backend: str) -> tuple[Any, Any]:
    if backend == 'native':
        return native_forward, native_backward
    from .triton.launch import triton_backward, triton_forward
    return triton_forward, triton_backward


@without_autocast
def _fused(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor,
        gamma: Tensor | None, base: Tensor | None, num_prefix_tokens: int, height: int, width: int, groups: int,
        support_groups: int, stride: int, bound: float, ratio: float, floor: float, backend: str,
) -> tuple[Tensor, ...]:
    weight_logits, sigma, hidden = predict_with_hidden(
        as_tokens(x), reduce_weight, reduce_bias, predict_weight, predict_bias, height, width, groups, support_groups,
        stride, bound, ratio, floor)
    run = _runs(backend)[0]
    made = (run(x, weight_logits, sigma, stride) if x.ndim == 4 else
            on_tokens(run)(x, weight_logits, sigma, num_prefix_tokens))
    y, kept = (made, x.new_empty(0)) if isinstance(made, Tensor) else made
    if gamma is not None:
        base = x if base is None else base
        gate = _gate_of(gamma, base)
        y = torch.lerp(base, y, gate, out=y) if y.dtype == base.dtype else torch.lerp(base, y.to(base.dtype), gate)
    return y, weight_logits, sigma, hidden, kept


def _sum_by_channel(product: Tensor, like: Tensor) -> Tensor:
    """Sums of a map or of tokens, for a gradient of `like`, in at least fp32."""
    dims = (0, 2, 3) if product.ndim == 4 else (0, 1)
    return product.sum(dims, dtype=torch.promote_types(product.dtype, torch.float32)).to(like.dtype)


def _through_gate(
        grad: Tensor, dpooled: Tensor, x: Tensor, gamma: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the features, the gate and the base (empty without one), from that of the pooled features.

    `dpooled`, which is overwritten, is the transposed pool of `grad`: its product with the features has the same sum as
    that of `grad` with the pooled features, which therefore need not be kept.
    """
    gate = _gate_of(gamma, dpooled)
    if base is None:
        difference = dpooled.sub_(grad)
        dgamma = _sum_by_channel(x * difference, gamma)
        return torch.addcmul(grad, difference, gate, out=difference), dgamma, grad.new_empty(0)
    dgamma = _sum_by_channel(x * dpooled, gamma) - _sum_by_channel(base * grad, gamma)
    return dpooled.mul_(gate), dgamma, grad * (1 - _gate_of(gamma, grad))


@without_autocast
def _fused_backward(
        grad: Tensor, weight_logits: Tensor, sigma: Tensor, hidden: Tensor, kept: Tensor, x: Tensor,
        reduce_weight: Tensor, reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor,
        gamma: Tensor | None, base: Tensor | None, num_prefix_tokens: int, stride: int, bound: float, ratio: float,
        floor: float, backend: str) -> tuple[Tensor, ...]:
    run = _runs(backend)[1]
    # Logits and supports meet the gradient in products with the features alone: these may be scaled in its place.
    features = x if gamma is None else x * _gate_of(gamma, x)
    saved = (features, weight_logits, sigma) if backend == 'native' else (features, weight_logits, sigma, kept)
    dx, dlogits, dsigma = (run(grad.to(x.dtype), *saved, stride) if x.ndim == 4 else
                           backward_on_tokens(run)(grad.to(x.dtype), *saved, num_prefix_tokens))
    dgamma = dbase = x.new_empty(0)
    if gamma is not None:
        dx, dgamma, dbase = _through_gate(grad, dx, x, gamma, base)
    dhidden, *grads = hidden_gradients(
        dlogits, dsigma, weight_logits, sigma, hidden, reduce_bias, predict_weight, predict_bias, stride, bound, ratio,
        floor)
    add_product(as_tokens(dx), dhidden, reduce_weight)
    return dx, reduce_gradient(dhidden, as_tokens(x), reduce_weight), *grads, dgamma, dbase


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be written
    ctx.how = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    prefix, _, _, _, _, stride, bound, ratio, floor, backend = ctx.how
    made = torch.ops.cpool_vision.context_pool_layer_fused_backward.default(
        grad, *ctx.saved_tensors, prefix, stride, bound, ratio, floor, backend)
    needs = ctx.needs_input_grad
    return *(g if needed else None for g, needed in zip(made, needs, strict=False)), *(None,) * len(ctx.how)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the kernels have no second derivative; use backend='reference' where gradients of gradients are needed")


_lib.impl('context_pool_layer', _context_pool_layer, 'CompositeImplicitAutograd')
# torch.func.vmap decomposes it too, into operators with their own rules.
_lib.impl('context_pool_layer', _context_pool_layer, 'FuncTorchBatchedDecomposition')
_lib.impl('context_pool_layer_fused', _fused, 'CompositeExplicitAutograd')
_lib.impl('context_pool_layer_fused_backward', _fused_backward, 'CompositeExplicitAutograd')
torch.library.register_autograd(
    'cpool_vision::context_pool_layer_fused', _backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd(
    'cpool_vision::context_pool_layer_fused_backward', _no_double_backward, lib=_lib)


@register_flop_formula(torch.ops.cpool_vision.context_pool_layer_fused)
def _flops(
        x_shape: Any, reduce_shape: Any, bias_shape: Any, predict_shape: Any, bias2_shape: Any, gamma_shape: Any,
        base_shape: Any, prefix: int, height: int, width: int, groups: int, support_groups: int, stride: int, *_: Any,
        **__: Any) -> int:
    batch, channels, pixels = x_shape[0], reduce_shape[1], height * width
    cells = -(-height // stride) * -(-width // stride)
    hidden = reduce_shape[0] * ((prefix + pixels) * channels + pixels * 9 * predict_shape[0])
    return 2 * batch * (hidden + channels * pixels * cells)


@register_flop_formula(torch.ops.cpool_vision.context_pool_layer_fused_backward)
def _backward_flops(
        grad_shape: Any, logits_shape: Any, sigma_shape: Any, hidden_shape: Any, kept_shape: Any, x_shape: Any,
        reduce_shape: Any, bias_shape: Any, predict_shape: Any, bias2_shape: Any, gamma_shape: Any, base_shape: Any,
        prefix: int, stride: int, *_: Any, **__: Any) -> int:
    return 2 * _flops(
        x_shape, reduce_shape, None, predict_shape, None, None, None, prefix, *logits_shape[2:], 0, 0, stride)
