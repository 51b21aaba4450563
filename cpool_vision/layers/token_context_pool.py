"""Context pooling of vision transformer tokens."""
from typing import Any

import torch
from torch import Tensor, fx

from .context_pool import ContextPool2d
from .mixer import Mixer2d


def _check_tokens(num_tokens: int, num_prefix_tokens: int, height: int, width: int) -> None:
    if num_tokens != num_prefix_tokens + height * width:
        raise ValueError(
            f'expected {num_prefix_tokens} prefix tokens and a {height} x {width} grid, got {num_tokens} tokens: '
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
                _check_tokens(x.shape[1], self.num_prefix_tokens, height, width)
        return x[:, self.num_prefix_tokens:].transpose(1, 2).unflatten(2, (height, width))

    def from_map(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Tokens of the pooled map `(B, C, H, W)` behind the prefix tokens of `x`."""
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

    def to_map(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        """The grid tokens of `x` as a map `(B, C, H, W)`, a view."""
        if height is None:
            height = self.grid_height
        if width is None:
            width = self.grid_width
        return self.grid_map(x, height, width)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        return self.from_map(x, self.mix_gated(self.to_map(x, height, width)))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, grid_size={self.grid_size}'


class TokenContextPool(TokenMixer, ContextPool2d):
    """`ContextPool2d` (stride 1) for tokens `(B, P + H * W, C)`: prefix tokens pass untouched, the grid is pooled.

    The grid of a call is `(height, width)` where given, else `grid_size`, which may be set at any time. The map handed
    to the operator is a channels-last view of the tokens. With `init='identity'` a fresh layer returns its input.

    Args:
        dim: Channels C.
        num_prefix_tokens: Leading tokens P that are not part of the grid (class, registers, distillation).
        grid_size: `(H, W)` of calls that name no grid.
        **kwargs: Further arguments of `ContextPool2d`.

    Raises:
        ValueError: An argument is out of range. On call, outside TorchScript and fx: the number of tokens does not
            fit the grid, or no grid is known.
    """

    def maps(self, x: Tensor, height: int | None = None, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Weight logits and supports (in tokens), both `(B, G, H, W)`, for tokens `x`. Stores nothing."""
        return self.predict_maps(self.to_map(x, height, width))
