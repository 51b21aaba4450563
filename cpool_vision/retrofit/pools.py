"""Context pools for the three layouts of features that timm's models hand on: NCHW, NHWC and tokens."""
import math
from typing import Any

from torch import Tensor, fx

from ..layers import ContextPool2d, TokenContextPool

LAYOUTS = ('NCHW', 'NHWC', 'NLC')


def solve_grid(num_tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid of `num_tokens` whose sides are in the ratio of `height` to `width`, up to rounding of one token.

    Returns:
        `(rows, columns)`, or None where no such grid has exactly this many tokens.
    """
    best: tuple[float, int, int] | None = None
    for rows in range(1, num_tokens + 1):
        if num_tokens % rows:
            continue
        columns = num_tokens // rows
        error = abs(math.log(rows * width / (columns * height)))
        if best is None or error < best[0]:
            best = error, rows, columns
    if best is None or best[0] > 0 and best[0] >= math.log(1 + 1 / min(best[1:])):
        return None
    return best[1], best[2]


class ChannelsLastContextPool(ContextPool2d):
    """`ContextPool2d` (stride 1) for maps `(B, H, W, C)`; arguments as there."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        if kwargs.get('stride', 1) != 1:
            raise ValueError(f'maps in NHWC are pooled at stride 1, got stride={kwargs["stride"]}')
        super().__init__(dim, **kwargs)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight logits and supports, both `(B, G, H, W)`, for `x`. Stores nothing."""
        return self.predict_maps(x.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool_map(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class GridContextPool(TokenContextPool):
    """`TokenContextPool` that follows the number of tokens: other sizes of the same aspect ratio need no setting.

    The grid of a call is `grid_size` where the tokens fit it, else the multiple of it that has as many tokens. Images
    of another aspect ratio need `set_image_size`. Under `torch.fx` the grid is `grid_size`.

    Raises:
        ValueError: On call: no grid in the proportions of `grid_size` has as many tokens.
    """

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """The grid of a call with `num_tokens` tokens, prefix tokens counted."""
        rows, columns = self.grid_height, self.grid_width
        num = num_tokens - self.num_prefix_tokens
        if num == rows * columns:
            return rows, columns
        if num > 0 and rows * columns > 0:
            height = math.isqrt(num * rows // columns)
            width = num // max(height, 1)
            if height * width == num and height * columns == width * rows:
                return height, width
        raise ValueError(
            f'{num} tokens (and {self.num_prefix_tokens} prefix tokens) do not form a grid in the proportions of '
            f'{rows} x {columns}: call cpool_vision.retrofit.set_image_size(model, (height, width)) first')

    def to_map(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        if height is None and width is None and not isinstance(x, fx.Proxy):
            height, width = self.grid_of(x.shape[1])
        return super().to_map(x, height, width)


def make_pool(layout: str, dim: int, num_prefix_tokens: int, grid: tuple[int, int], **kwargs: Any) -> ContextPool2d:
    """A pool for features of `layout` (one of `LAYOUTS`); `kwargs` as for `ContextPool2d`."""
    if layout == 'NLC':
        return GridContextPool(dim, num_prefix_tokens=num_prefix_tokens, grid_size=grid, **kwargs)
    return (ChannelsLastContextPool if layout == 'NHWC' else ContextPool2d)(dim, **kwargs)
