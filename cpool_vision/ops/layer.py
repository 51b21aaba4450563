"""The whole layer on tokens, predictor and pool, as one operator: gradients of the features meet in one tensor."""
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import without_autocast
from .backends import choose_backend, runs_triton
from .native import native_backward, native_forward
from .predictor import WEIGHTS, hidden_gradients, may_fuse, predict_with_hidden, reduce_gradient
from .tokens import WRITE_TOKENS, backward_on_tokens, on_tokens

_lib = torch.library.Library('cpool_vision', 'FRAGMENT')

_HOW = (
    'int num_prefix_tokens, int height, int width, int groups, int support_groups, float bound, float ratio, '
    'float floor')
# TorchScript types every bias as optional.
_lib.define(
    'pool_tokens(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor predict_weight, Tensor? predict_bias, '
    f'{_HOW}, str? backend=None) -> Tensor')
_lib.define(f'pool_tokens_fused(Tensor x, {WEIGHTS}, {_HOW}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)')
_lib.define(
    'pool_tokens_fused_backward(Tensor grad, Tensor weight_logits, Tensor sigma, Tensor hidden, Tensor kept, Tensor x, '
    f'{WEIGHTS}, int num_prefix_tokens, float bound, float ratio, float floor, str backend) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)')


def compose_layer(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, predict_weight: Tensor,
        predict_bias: Tensor | None, num_prefix_tokens: int, height: int, width: int, groups: int,
        support_groups: int, bound: float, ratio: float, floor: float, backend: str | None = None) -> Tensor:
    """Tokens `(B, P + H * W, C)` pooled with maps that they predict: by one operator for the maps, one for the pool."""
    weight_logits, sigma = torch.ops.cpool_vision.predict_maps(
        x, reduce_weight, reduce_bias, predict_weight, predict_bias, height, width, groups, support_groups, 1,
        bound, ratio, floor)
    return torch.ops.cpool_vision.context_pool_tokens(x, weight_logits, sigma, num_prefix_tokens, backend)


def _chosen(x: Tensor, backend: str | None, *weights: Tensor | None) -> str | None:
    """The backend whose kernels read and write tokens like `x`, or None where one operator cannot do it all."""
    predict_weight, *biases = weights
    if predict_weight is None or not x.shape[1] or not may_fuse(x, predict_weight, *biases):
        return None
    chosen = choose_backend(x, x, x, 1, None, backend)
    return chosen if chosen in WRITE_TOKENS and runs_triton(x) == (chosen == 'triton') else None


def _pool_tokens(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, predict_weight: Tensor,
        predict_bias: Tensor | None, num_prefix_tokens: int, height: int, width: int, groups: int,
        support_groups: int, bound: float, ratio: float, floor: float, backend: str | None = None) -> Tensor:
    """What is traced, transformed or of another kind is left to the operators of which it is made."""
    args = (x, reduce_weight, reduce_bias, predict_weight, predict_bias, num_prefix_tokens, height, width, groups,
            support_groups, bound, ratio, floor)
    chosen = _chosen(x, backend, predict_weight, reduce_bias, predict_bias)
    if chosen is None:
        return compose_layer(*args, backend)
    return torch.ops.cpool_vision.pool_tokens_fused.default(*args, chosen)[0]


def _runs(backend: str) -> tuple[Any, Any]:
    if backend == 'native':
        return native_forward, native_backward
    from .triton.launch import triton_backward, triton_forward
    return triton_forward, triton_backward


@without_autocast
def _fused(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor,
        num_prefix_tokens: int, height: int, width: int, groups: int, support_groups: int, bound: float, ratio: float,
        floor: float, backend: str) -> tuple[Tensor, ...]:
    weight_logits, sigma, hidden = predict_with_hidden(
        x, reduce_weight, reduce_bias, predict_weight, predict_bias, height, width, groups, support_groups, 1, bound,
        ratio, floor)
    made = on_tokens(_runs(backend)[0])(x, weight_logits, sigma, num_prefix_tokens)
    y, kept = (made, x.new_empty(0)) if isinstance(made, Tensor) else made
    return y, weight_logits, sigma, hidden, kept


@without_autocast
def _fused_backward(
        grad: Tensor, weight_logits: Tensor, sigma: Tensor, hidden: Tensor, kept: Tensor, x: Tensor,
        reduce_weight: Tensor, reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor,
        num_prefix_tokens: int, bound: float, ratio: float, floor: float, backend: str) -> tuple[Tensor, ...]:
    aside = () if backend == 'native' else (kept,)
    dx, dlogits, dsigma = backward_on_tokens(_runs(backend)[1])(
        grad, x, weight_logits, sigma, *aside, num_prefix_tokens)
    dhidden, *grads = hidden_gradients(
        dlogits, dsigma, weight_logits, sigma, hidden, reduce_bias, predict_weight, predict_bias, 1, bound, ratio,
        floor)
    # Added where it lies, in the product.
    dx.flatten(0, 1).addmm_(dhidden.flatten(0, 1), reduce_weight.flatten(1).to(x.dtype))
    return dx, reduce_gradient(dhidden, x, reduce_weight), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be written
    ctx.how = inputs[5:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    *aside, x, w1, b1, w2, b2 = ctx.saved_tensors
    prefix, *_, bound, ratio, floor, backend = ctx.how
    made = torch.ops.cpool_vision.pool_tokens_fused_backward.default(
        grad, *aside, x, w1, b1, w2, b2, prefix, bound, ratio, floor, backend)
    return *(g if needs else None for g, needs in zip(made, ctx.needs_input_grad, strict=False)), *(None,) * 9


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the kernels have no second derivative; use backend='reference' where gradients of gradients are needed")


_lib.impl('pool_tokens', _pool_tokens, 'CompositeImplicitAutograd')
# torch.func.vmap decomposes it too, into operators with their own rules.
_lib.impl('pool_tokens', _pool_tokens, 'FuncTorchBatchedDecomposition')
_lib.impl('pool_tokens_fused', _fused, 'CompositeExplicitAutograd')
_lib.impl('pool_tokens_fused_backward', _fused_backward, 'CompositeExplicitAutograd')
torch.library.register_autograd('cpool_vision::pool_tokens_fused', _backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd('cpool_vision::pool_tokens_fused_backward', _no_double_backward, lib=_lib)


@register_flop_formula(torch.ops.cpool_vision.pool_tokens_fused)
def _flops(
        x_shape: Any, reduce_shape: Any, bias_shape: Any, predict_shape: Any, bias2_shape: Any, prefix: int,
        height: int, width: int, *_: Any, **__: Any) -> int:
    b, tokens, channels = x_shape
    predictor = b * tokens * reduce_shape[0] * channels + b * height * width * 9 * reduce_shape[0] * predict_shape[0]
    return 2 * (predictor + b * channels * (height * width) ** 2)


@register_flop_formula(torch.ops.cpool_vision.pool_tokens_fused_backward)
def _backward_flops(
        grad_shape: Any, logits_shape: Any, sigma_shape: Any, hidden_shape: Any, kept_shape: Any, x_shape: Any,
        *shapes: Any, **_: Any) -> int:
    return 2 * _flops(x_shape, *shapes[:4], shapes[4], *logits_shape[2:])
