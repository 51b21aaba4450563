"""Records the weight logits and supports of a model's context pools for a batch of images."""
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import context_pools


class ContextMaps(NamedTuple):
    """Maps of one context pool for one batch.

    Attributes:
        weight_logits: `(B, G, H, W)`, logarithm of each pixel's pooling weight, up to a constant per map.
        sigma: `(B, G, Ho, Wo)`, supports in pixels (or tokens) of the pooled map.
        grid: `(H, W)` of the pooled map.
        stride: Output cells are `stride` pixels apart.
        windows: Maps per image. Above 1 for pools of windows; B is then the number of images times `windows`.
        limits: Smallest and largest support of the pool on this grid; None if unknown.
        gate: Mean absolute gate over channels (0 returns the input, 1 the pooled map); None without a gate.
    """
    weight_logits: Tensor
    sigma: Tensor
    grid: tuple[int, int]
    stride: int
    windows: int = 1
    limits: tuple[float, float] | None = None
    gate: float | None = None

    def cell(self, image_size: tuple[int, int]) -> float:
        """Returns the size of a pixel of the pooled map in pixels of an image (geometric mean of height and width)."""
        return math.sqrt(image_size[0] * image_size[1] / (self.grid[0] * self.grid[1] * self.windows))


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Context manager that puts a model into eval mode and restores the mode of every module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def context_maps(model: nn.Module, images: Tensor) -> dict[str, ContextMaps]:
    """Runs a model and records the weight logits and supports of every context pool.

    The model runs once, in eval mode and without gradients. Hooks are removed and the mode of every module is restored,
    even if the model raises an exception. Maps of token pools have the shape of their grid.

    Args:
        model: An eager model (not scripted or compiled) with `ContextPool2d` or `TokenContextPool` layers.
        images: Input of the model, on its device.

    Returns:
        Maps by name of the pool, in order of execution. For a pool that ran several times, those of the last run.

    Raises:
        ValueError: The model has no context pool.
    """
    pools = context_pools(model)
    if not pools:
        raise ValueError(
            f'{type(model).__name__} has no context pool: build a cpool variant with at least one position')
    found: dict[str, ContextMaps] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(pool: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
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
