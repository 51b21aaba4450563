"""The operator on tokens after a prefix: kernels read and write the token tensors themselves."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import choose_backend

# Backends whose kernels write after a prefix.
WRITE_TOKENS = ('triton', 'native')


def context_pool_tokens(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, num_prefix_tokens: int, backend: str | None = None,
        offset: Tensor | None = None) -> Tensor:
    """Tokens `(B, P + H * W, C)` whose grid is pooled with maps `(B, G, H, W)`; P prefix tokens pass as they are."""
    grid = grid_map(x, num_prefix_tokens, weight_logits)
    chosen = choose_backend(grid, weight_logits, sigma, 1, offset, backend)
    if num_prefix_tokens > 0 and chosen in WRITE_TOKENS:
        operator = getattr(torch.ops.cpool_vision, f'context_pool_tokens_{chosen}').default
        result = operator(x, weight_logits, sigma, num_prefix_tokens)
        return result if isinstance(result, Tensor) else result[0]
    y = torch.ops.cpool_vision.context_pool2d(grid, weight_logits, sigma, 1, chosen, offset).flatten(2).transpose(1, 2)
    return torch.cat([x[:, :num_prefix_tokens], y], dim=1) if num_prefix_tokens > 0 else y


def as_tokens(x: Tensor) -> Tensor:
    """A map `(B, C, H, W)` as tokens `(B, H * W, C)`, a view where memory allows it; tokens as they are."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def grid_map(x: Tensor, num_prefix_tokens: int, like: Tensor) -> Tensor:
    """The grid tokens of `x` `(B, P + H * W, C)` as a map `(B, C, H, W)` of the size of `like`, a view."""
    return x[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, like.shape[2:])


def empty_tokens(like: Tensor, num_prefix_tokens: int) -> Tensor:
    """Uninitialized tokens: contiguous after a prefix, otherwise in the layout of `like`, as a base model has them."""
    return like.new_empty(like.shape) if num_prefix_tokens > 0 else torch.empty_like(like)


def _with_prefix_of(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Tokens with the prefix of `tokens`, and the rest uninitialized."""
    y = empty_tokens(tokens, num_prefix_tokens)
    y[:, :num_prefix_tokens] = tokens[:, :num_prefix_tokens]
    return y


def on_tokens(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, the forward pass of a backend that writes to `out`, on tokens after a prefix."""
    def forward(x: Tensor, weight_logits: Tensor, sigma: Tensor, num_prefix_tokens: int) -> Any:
        y = _with_prefix_of(x, num_prefix_tokens)
        result = run(grid_map(x, num_prefix_tokens, weight_logits), weight_logits, sigma, 1,
                     out=grid_map(y, num_prefix_tokens, weight_logits))
        return (y, *result[1:]) if isinstance(result, tuple) else y
    return forward


def backward_on_tokens(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, the backward pass of a backend that writes to `dx`, on tokens after a prefix, whose gradient passes."""
    def backward(grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *kept, num_prefix_tokens = args
        dx = _with_prefix_of(grad.to(x.dtype), num_prefix_tokens)
        _, dlogits, dsigma = run(
            grid_map(grad, num_prefix_tokens, sigma), grid_map(x, num_prefix_tokens, sigma), weight_logits, sigma,
            *kept, 1, dx=grid_map(dx, num_prefix_tokens, sigma))
        return dx, dlogits, dsigma
    return backward
