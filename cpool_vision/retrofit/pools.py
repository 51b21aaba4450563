"""Context pools for the three feature layouts of timm models: NCHW, NHWC and tokens."""
import math
from typing import Any

from torch import Tensor, fx, nn

from ..layers import ContextPool2d, TokenContextPool

LAYOUTS = ('NCHW', 'NHWC', 'NLC')


def solve_grid(num_tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Finds the grid of `num_tokens` with the aspect ratio `height` : `width`, up to rounding by one token.

    Returns:
        `(rows, columns)`, or None if no such grid has exactly this many tokens.
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
    """`ContextPool2d` (stride 1) for maps `(B, H, W, C)`, with the same arguments."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        if kwargs.get('stride', 1) != 1:
            raise ValueError(f'stride must be 1 for maps in NHWC, got {kwargs["stride"]}')
        super().__init__(dim, **kwargs)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight logits and supports for `x`, both `(B, G, H, W)`."""
        return self.predict_maps(x.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix_gated(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # keeps the strides of the input: others could make the next layer use a kernel that rounds differently
        return y.contiguous() if isinstance(x, fx.Proxy) or x.is_contiguous() else y


class GridContextPool(TokenContextPool):
    """`TokenContextPool` whose grid follows the size of the images, see `follow_images`.

    The grid of a call has the aspect ratio of the last image. Before the first image, and under `torch.fx`, it is
    `grid_size`.

    Raises:
        ValueError: When called, if the tokens do not form such a grid.
    """

    image_size: tuple[int, int] | None = None

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """Returns the grid of a call with `num_tokens` tokens, including prefix tokens."""
        num = num_tokens - self.num_prefix_tokens
        size = self.image_size
        grid = self.grid_size if size is None else solve_grid(num, *size)
        if grid is None or num != grid[0] * grid[1]:
            seen = f'the {self.grid_height} x {self.grid_width} grid' if size is None else \
                f'a grid with the aspect ratio of images of {size[0]} x {size[1]} pixels'
            raise ValueError(f'{num} tokens (and {self.num_prefix_tokens} prefix tokens) do not form {seen}: for '
                             'another grid, set grid_size of the pool, and image_size to None')
        return grid

    def call_grid(self, x: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        if height is None and width is None and not isinstance(x, fx.Proxy):
            height, width = self.grid_of(x.shape[1])
        return super().call_grid(x, height, width)


def _tell_image_size(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(x, Tensor):
        if x.ndim != 4:
            raise ValueError(f'a retrofitted {type(module).__name__} reads images (B, C, H, W), got shape '
                             f'{tuple(x.shape)}: patches with coordinates and padding have no grid to pool on')
        for pool in module.cpool_listeners:  # type: ignore[union-attr]
            pool.image_size = (x.shape[-2], x.shape[-1])


def follow_images(reader: nn.Module, pools: list[GridContextPool]) -> None:
    """Makes `reader`, the module that reads the images, pass their size to token pools."""
    # a tuple does not register the pools as submodules, and a deep copy refers to its own pools
    reader.cpool_listeners = tuple(pools)  # type: ignore[assignment]
    reader.register_forward_pre_hook(_tell_image_size, with_kwargs=True)


def unfollow_images(model: nn.Module) -> None:
    """Undoes `follow_images` in all modules of `model`."""
    for module in model.modules():
        if hasattr(module, 'cpool_listeners'):
            del module.cpool_listeners
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _tell_image_size]:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def create_pool(layout: str, dim: int, num_prefix_tokens: int, grid: tuple[int, int], **kwargs: Any) -> ContextPool2d:
    """Creates a pool for features of `layout` (one of `LAYOUTS`); `kwargs` as in `ContextPool2d`."""
    if layout == 'NLC':
        return GridContextPool(dim, num_prefix_tokens=num_prefix_tokens, grid_size=grid, **kwargs)
    return (ChannelsLastContextPool if layout == 'NHWC' else ContextPool2d)(dim, **kwargs)
