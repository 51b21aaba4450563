"""Context pooling of vision transformer tokens."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .context_pool import ContextPool2d, is_plain_convolution
from .mixer import Mixer2d


def check_tokens(x: Tensor, dim: int, num_prefix_tokens: int, height: int, width: int) -> None:
    """Raises ValueError where `x` is not `(B, P + H * W, C)` with `dim` channels."""
    if x.ndim != 3:
        remedy = 'add a batch dimension, x[None]' if x.ndim == 2 else 'flatten the map, x.flatten(2).transpose(1, 2)'
        raise ValueError(f'expected tokens (B, N, {dim}), got shape {tuple(x.shape)}: {remedy}')
    if x.shape[2] != dim:
        raise ValueError(f'expected {dim} channels, got tokens of shape {tuple(x.shape)}: build the layer with '
                         f'dim={x.shape[2]}')
    if x.shape[1] != num_prefix_tokens + height * width:
        raise ValueError(
            f'expected {num_prefix_tokens} prefix tokens and a {height} x {width} grid, got {x.shape[1]} tokens: '
            f'pass the height and width of the grid, or set grid_size')


class SequenceMixer(Mixer2d):
    """What mixers of tokens `(B, P + N, C)` share: they have stride 1, and P prefix tokens pass untouched.

    Stands in front of a mixer of maps among the bases of a class.
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 0, **kwargs: Any) -> None:
        if kwargs.get('stride', 1) != 1:
            raise ValueError(f'tokens are pooled at stride 1, got stride={kwargs["stride"]}')
        if num_prefix_tokens < 0:
            raise ValueError(f'num_prefix_tokens must be at least 0, got {num_prefix_tokens}')
        super().__init__(dim, **kwargs)
        self.num_prefix_tokens = num_prefix_tokens

    def grid_map(self, x: Tensor, height: int, width: int) -> Tensor:
        """The grid tokens of `x` as a map `(B, C, H, W)`, a view."""
        if not torch.jit.is_scripting():
            if not isinstance(x, fx.Proxy):
                check_tokens(x, x.shape[-1], self.num_prefix_tokens, height, width)
        return x[:, self.num_prefix_tokens:].transpose(1, 2).unflatten(2, (height, width))

    def from_map(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Tokens of the pooled map `(B, C, H, W)` after the prefix tokens of `x`."""
        y = pooled.flatten(2).transpose(1, 2)
        if self.num_prefix_tokens > 0:
            y = torch.cat([x[:, :self.num_prefix_tokens], y], dim=1)
        return y

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, num_prefix_tokens={self.num_prefix_tokens}'


class TokenMixer(SequenceMixer):
    """What mixers of the tokens of one grid per call, `(B, P + H * W, C)`, share."""

    def __init__(
            self,
            dim: int,
            num_prefix_tokens: int = 0,
            grid_size: tuple[int, int] | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_prefix_tokens, **kwargs)
        self.grid_height, self.grid_width = grid_size if grid_size is not None else (0, 0)

    @property
    def grid_size(self) -> tuple[int, int]:
        """`(H, W)` of calls that name no grid; `(0, 0)` where none was set."""
        return self.grid_height, self.grid_width

    @grid_size.setter
    def grid_size(self, grid_size: tuple[int, int]) -> None:
        self.grid_height, self.grid_width = grid_size

    def call_grid(self, x: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        """The grid of a call with the tokens `x`."""
        if height is None:
            height = self.grid_height
        if width is None:
            width = self.grid_width
        return height, width

    def to_map(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        """The grid tokens of `x` as a map `(B, C, H, W)`, a view."""
        height, width = self.call_grid(x, height, width)
        return self.grid_map(x, height, width)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        return self.from_map(x, self.mix_gated(self.to_map(x, height, width)))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, grid_size={self.grid_size}'


class TokenContextPool(TokenMixer, ContextPool2d):
    """`ContextPool2d` (stride 1) for tokens `(B, P + H * W, C)`: pools the grid, returns prefix tokens unchanged.

    The grid of a call is `(height, width)` if given, else `grid_size`, which may be set at any time. Predictor and
    operator read the tokens in place and write the result after the prefix tokens, without a concatenation.
    With `init='identity'` a new layer returns its input.

    Args:
        dim: Channels C.
        num_prefix_tokens: Leading tokens P that are not part of the grid (class, registers, distillation).
        grid_size: `(H, W)` of calls without `height` and `width`.
        **kwargs: More arguments of `ContextPool2d`.

    Raises:
        ValueError: An argument is out of range. On call, outside TorchScript and fx: the number of tokens does not
            fit the grid, or no grid is known.
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 0, **kwargs: Any) -> None:
        super().__init__(dim, num_prefix_tokens, **kwargs)
        # a base or a convolution works on maps
        self.on_tokens = self.depthwise is None and kwargs.get('base') is None

    def maps(self, x: Tensor, height: int | None = None, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Weight logits and supports (in tokens), both `(B, G, H, W)`, for tokens `x`. Stores nothing."""
        height, width = self.call_grid(x, height, width)
        if self.may_fuse():
            return self.predict_token_maps(x, height, width)
        return self.read_maps(self.raw_token_maps(x, height, width))

    def raw_token_maps(self, x: Tensor, height: int, width: int) -> Tensor:
        """`raw_maps` of the grid tokens of `x`."""
        if not torch.jit.is_scripting():
            if is_plain_convolution(self.reduce, 1):
                # Prefix tokens go through the first product too: they cost less than a copy of the others.
                hidden = self.act(F.linear(x, self.reduce.weight.flatten(1), self.reduce.bias))
                return self.predict(self.grid_map(hidden, height, width))
        return self.raw_maps(self.grid_map(x, height, width))

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        if not self.on_tokens:
            return self.from_map(x, self.mix_gated(self.to_map(x, height, width)))
        height, width = self.call_grid(x, height, width)
        if not torch.jit.is_scripting():
            if not isinstance(x, fx.Proxy):
                check_tokens(x, self.dim, self.num_prefix_tokens, height, width)
        features = torch.ops.cpool_vision.to_autocast(x)
        if self.offset is None and self.may_fuse():
            base = x if self.gamma is not None else None
            return self.pool_as_one(features, self.gamma, base, self.num_prefix_tokens, height, width)
        raw = self.raw_token_maps(features, height, width)
        weight_logits, sigma = self.read_maps(raw)
        y = torch.ops.cpool_vision.context_pool_tokens(
            features, weight_logits, sigma, self.num_prefix_tokens, self.backend,
            self.read_offset(raw, height, width))
        if self.gamma is not None:
            y = torch.lerp(x, y.type_as(x), self.gamma.type_as(x))
        return y
