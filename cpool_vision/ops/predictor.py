"""The predictor of weight logits and supports on tokens, as one operator with its own derivative."""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import without_autocast
from .backends import runs_triton
from .checks import why_not_differentiable
from .maps import empty_pair, largest_support, make_fused_maps, make_fused_maps_backward

_lib = torch.library.Library('cpool_vision', 'FRAGMENT')

WEIGHTS = 'Tensor reduce_weight, Tensor reduce_bias, Tensor predict_weight, Tensor predict_bias'
_HOW = 'int height, int width, int groups, int support_groups, int stride, float bound, float ratio, float floor'
# TorchScript types every bias as optional.
_lib.define(
    'predict_maps(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor predict_weight, Tensor? predict_bias, '
    f'{_HOW}) -> (Tensor, Tensor)')
_lib.define(f'predict_maps_fused(Tensor x, {WEIGHTS}, {_HOW}) -> (Tensor, Tensor, Tensor)')
_lib.define(
    'predict_maps_fused_backward(Tensor grad_logits, Tensor grad_sigma, Tensor weight_logits, Tensor sigma, '
    f'Tensor hidden, Tensor x, {WEIGHTS}, int stride, float bound, float ratio, float floor) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)')
# Most hidden channels and rows of output that the kernels take.
MOST = 128, 64


def _grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """The last `height * width` tokens as a map `(B, C, height, width)`, a view."""
    return tokens[:, tokens.shape[1] - height * width:].transpose(1, 2).unflatten(2, (height, width))


def compose_maps(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, predict_weight: Tensor,
        predict_bias: Tensor | None, height: int, width: int, *how: Any) -> tuple[Tensor, Tensor]:
    """Weight logits and supports of tokens `(B, P + H * W, C)` by torch's operators.

    A 1x1 convolution `reduce_weight` `(h, C, 1, 1)`, exact GELU, a 3x3 convolution `predict_weight` `(K, h, 3, 3)`
    over the grid, whose border counts as zero, and `supports_and_logits` with the arguments `how`.
    """
    if x.stride(2) == 1:
        # Prefix tokens go through the product too: they cost less than a copy of the others.
        hidden = _grid(F.gelu(F.linear(x, reduce_weight.flatten(1), reduce_bias)), height, width)
    else:
        hidden = F.gelu(F.conv2d(_grid(x, height, width), reduce_weight, reduce_bias))
    raw = F.conv2d(hidden, predict_weight, predict_bias, padding=1)
    return torch.ops.cpool_vision.supports_and_logits(raw, *how)


def may_fuse(x: Tensor, predict_weight: Tensor, *biases: Tensor | None) -> bool:
    """Whether the predictor of the tokens `x` can be a part of an operator with its own derivative."""
    fits = not x.is_cuda or predict_weight.shape[1] <= MOST[0] and predict_weight.shape[0] <= MOST[1]
    return type(x) is Tensor and why_not_differentiable(x) is None and fits and None not in biases


def _predict_maps(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, predict_weight: Tensor,
        predict_bias: Tensor | None, *how: Any) -> tuple[Tensor, Tensor]:
    """What is traced, transformed or of another kind is left to torch's own operators, which compilers fuse."""
    run: Callable[..., tuple[Tensor, ...]] = compose_maps
    if runs_triton(x) and x.stride(2) == 1 and may_fuse(x, predict_weight, reduce_bias, predict_bias):
        run = torch.ops.cpool_vision.predict_maps_fused.default
    weight_logits, sigma, *_ = run(x, reduce_weight, reduce_bias, predict_weight, predict_bias, *how)
    return weight_logits, sigma


def predict_with_hidden(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor,
        height: int, width: int, groups: int, support_groups: int, stride: int, bound: float, ratio: float,
        floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight logits and supports as `compose_maps`, and the hidden map before bias and activation, contiguous."""
    weight = reduce_weight.flatten(1).to(x.dtype)
    # Of a map in NCHW the other product is made by image, without a copy.
    hidden = F.linear(x, weight) if x.stride(2) == 1 else x.bmm(weight.t().expand(len(x), -1, -1))
    if runs_triton(x):
        from .triton.predictor import fill_predicted
        weight_logits, sigma = empty_pair(x, x.shape[0], height, width, groups, support_groups, stride)
        fill_predicted(hidden, reduce_bias, predict_weight, predict_bias, weight_logits, sigma, stride, bound,
                       largest_support(weight_logits, ratio), floor)
        return weight_logits, sigma, hidden
    # The sum is rounded after the activation only, as in Triton's kernel.
    act = _grid(F.gelu(hidden + reduce_bias).to(x.dtype), height, width)
    raw = F.conv2d(act, predict_weight.to(x.dtype), predict_bias.to(x.dtype), padding=1)
    return *make_fused_maps(raw, groups, support_groups, stride, bound, ratio, floor), hidden


def _fused_fake(
        x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor,
        height: int, width: int, groups: int, support_groups: int, stride: int, *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    maps = empty_pair(x, x.shape[0], height, width, groups, support_groups, stride)
    return *maps, x.new_empty(*x.shape[:2], reduce_weight.shape[0])


def hidden_gradients(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, hidden: Tensor,
        reduce_bias: Tensor, predict_weight: Tensor, predict_bias: Tensor, stride: int, bound: float, ratio: float,
        floor: float) -> tuple[Tensor, ...]:
    """Gradients of the hidden map, the first bias, the second weight and the second bias."""
    if runs_triton(hidden):
        from .triton.predictor import predicted_gradients
        return predicted_gradients(
            grad_logits, grad_sigma, weight_logits, sigma, hidden, reduce_bias, predict_weight, predict_bias, stride,
            bound, largest_support(weight_logits, ratio), floor)
    dtype, (height, width) = hidden.dtype, weight_logits.shape[2:]
    grad = make_fused_maps_backward(
        grad_logits, grad_sigma, weight_logits, sigma, predict_weight.shape[0], True, dtype, stride, bound, ratio,
        floor)
    before = hidden + reduce_bias
    dact, dpredict, dbias2 = torch.ops.aten.convolution_backward(
        grad, _grid(F.gelu(before).to(dtype), height, width), predict_weight.to(dtype), [predict_weight.shape[0]],
        [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3)
    dhidden = torch.zeros_like(hidden)
    _grid(dhidden, height, width).copy_(torch.ops.aten.gelu_backward(
        dact.to(before.dtype), _grid(before, height, width)))
    return dhidden, *(g.to(t.dtype) for g, t in (
        (dhidden.sum((0, 1)), reduce_bias), (dpredict, predict_weight), (dbias2, predict_bias)))


def reduce_gradient(dhidden: Tensor, x: Tensor, reduce_weight: Tensor) -> Tensor:
    """Gradient of the first weight."""
    if x.stride(2) == 1:
        product = dhidden.flatten(0, 1).t() @ x.flatten(0, 1)
    else:
        product = dhidden.transpose(1, 2).bmm(x).sum(0)
    return product.to(reduce_weight.dtype).view(reduce_weight.shape)


def add_product(dx: Tensor, dhidden: Tensor, reduce_weight: Tensor) -> None:
    """Adds the hidden map's share to the gradient of the features `dx`, where it lies, in the product."""
    weight = reduce_weight.flatten(1).to(dx.dtype)
    if dx.is_contiguous():
        dx.flatten(0, 1).addmm_(dhidden.flatten(0, 1), weight)
    else:
        dx.transpose(1, 2).baddbmm_(weight.t().expand(len(dx), -1, -1), dhidden.transpose(1, 2))


@without_autocast
def _fused_backward(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, hidden: Tensor, x: Tensor,
        reduce_weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dhidden, *grads = hidden_gradients(grad_logits, grad_sigma, weight_logits, sigma, hidden, *others)
    dx = dhidden @ reduce_weight.flatten(1).to(x.dtype)
    return dx, reduce_gradient(dhidden, x, reduce_weight), *grads


def _fused_backward_fake(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, hidden: Tensor, x: Tensor,
        *weights: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(torch.empty_like(t) for t in weights[:4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be written
    ctx.size, ctx.how = output[0].shape[2:], inputs[7:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    weight_logits, sigma, hidden, *inputs = ctx.saved_tensors
    grads = tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, (weight_logits, sigma), strict=False))
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        maps = compose_maps(*inputs, *ctx.size, *ctx.how)
        needed = [t for t, needs in zip(inputs, ctx.needs_input_grad, strict=False) if needs]
        found = iter(torch.autograd.grad(maps, needed, grads, create_graph=True))
        return *(next(found) if needs else None for needs in ctx.needs_input_grad[:5]), *(None,) * 8
    made = torch.ops.cpool_vision.predict_maps_fused_backward.default(
        *grads, weight_logits, sigma, hidden, *inputs, *ctx.how[2:])
    return *(g if needs else None for g, needs in zip(made, ctx.needs_input_grad, strict=False)), *(None,) * 8


_lib.impl('predict_maps', _predict_maps, 'CompositeImplicitAutograd')
# torch.func.vmap decomposes it too, into operators with their own rules.
_lib.impl('predict_maps', _predict_maps, 'FuncTorchBatchedDecomposition')
_lib.impl('predict_maps_fused', without_autocast(predict_with_hidden), 'CompositeExplicitAutograd')
_lib.impl('predict_maps_fused_backward', _fused_backward, 'CompositeExplicitAutograd')
torch.library.register_fake('cpool_vision::predict_maps_fused', _fused_fake, lib=_lib)
torch.library.register_fake('cpool_vision::predict_maps_fused_backward', _fused_backward_fake, lib=_lib)
torch.library.register_autograd('cpool_vision::predict_maps_fused', _backward, setup_context=_setup_context, lib=_lib)


@register_flop_formula(torch.ops.cpool_vision.predict_maps_fused)
def _flops(x_shape: Any, reduce_shape: Any, bias_shape: Any, predict_shape: Any, *_: Any, **__: Any) -> int:
    b, tokens, channels = x_shape
    return 2 * b * tokens * reduce_shape[0] * (channels + 9 * predict_shape[0])


@register_flop_formula(torch.ops.cpool_vision.predict_maps_fused_backward)
def _backward_flops(
        grad_shape: Any, sigma_grad_shape: Any, logits_shape: Any, sigma_shape: Any, hidden_shape: Any, x_shape: Any,
        *weight_shapes: Any, **_: Any) -> int:
    return 2 * _flops(x_shape, *weight_shapes[:3])
