"""Weight logits and supports of every context pool of a model for a batch of images."""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import context_pools


class ContextMaps(NamedTuple):
    """Maps of one context pool for one batch.

    Attributes:
        weight_logits: `(B, G, H, W)`, the log of each pixel's pooling weight, up to a constant per map.
        sigma: `(B, G, Ho, Wo)`, supports in pixels (or tokens) of the map that was pooled.
        grid: `(H, W)` of the map that was pooled.
        stride: Output cells are `stride` pixels apart.
        windows: Maps per image: more than one for pools of windows, where B is the number of images times `windows`.
        limits: Smallest and largest support that the pool can have on this grid; None if not known.
        gate: Mean over channels of the absolute gate, None without a gate: 0 returns the input, 1 the pooled map.
    """
    weight_logits: Tensor
    sigma: Tensor
    grid: tuple[int, int]
    stride: int
    windows: int = 1
    limits: tuple[float, float] | None = None
    gate: float | None = None

    def cell(self, image_size: tuple[int, int]) -> float:
        """Side of a pixel of the pooled map in pixels of an image of `(height, width)`: the geometric mean of both."""
        return math.sqrt(image_size[0] * image_size[1] / (self.grid[0] * self.grid[1] * self.windows))


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and every module of it back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def context_maps(model: nn.Module, images: Tensor) -> dict[str, ContextMaps]:
    """Weight logits and supports of every context pool of `model` for `images`, by module name in order of execution.

    The model runs once, in eval mode and without gradients. Hooks are removed and the mode of every module is restored,
    also when the model raises. Maps of token pools have the shape of their grid.

    Args:
        model: Any eager model with `ContextPool2d` or `TokenContextPool` layers (not scripted, not compiled).
        images: Input of the model, on its device.

    Returns:
        One `ContextMaps` per pool that ran; the last one if it ran several times.

    Raises:
        ValueError: The model has no context pool.
    """
    pools = context_pools(model)
    if not pools:
        raise ValueError(
            f'{type(model).__name__} has no context pool: build a cpool variant with at least one position')
    found: dict[str, ContextMaps] = {}

    def record(name: str) -> Any:
        def hook(pool: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            weight_logits, sigma = pool.maps(*args, **kwargs)
            height, width = weight_logits.shape[-2:]
            windows = len(sigma) // len(images) if len(images) and len(sigma) % len(images) == 0 else 1
            limits = pool.floor, pool.floor + pool.ratio * math.sqrt(height * width)
            gate = None if pool.gamma is None else float(pool.gamma.detach().double().abs().mean())
            found[name] = ContextMaps(weight_logits, sigma, (height, width), pool.stride, windows, limits, gate)
        return hook

    handles = [pool.register_forward_pre_hook(record(name), with_kwargs=True) for name, pool in pools.items()]
    try:
        with kept_modes(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
