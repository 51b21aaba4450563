"""Effective receptive fields: how strongly a unit of a feature map depends on each pixel of the input."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import Mixer2d, mixers
from .maps import kept_modes


class ReceptiveField(NamedTuple):
    """Effective receptive field of one unit.

    Attributes:
        map: `(H, W)` fp64 on the CPU: root mean square of the gradient at each pixel of the input; sums to one.
        unit: (row, column) of the unit in the feature map.
        grid: (rows, columns) of the feature map.
        center: (y, x) in pixels of the input, whose first pixel spans [0, 1]: center of mass of the mean squared
            gradient. Strided and padded convolutions move it away from the center of the unit's cell.
    """

    map: Tensor
    unit: tuple[int, int]
    grid: tuple[int, int]
    center: tuple[float, float]

    def mass_within(self) -> tuple[Tensor, Tensor]:
        """Returns the distinct distances from the center in pixels, ascending, and the mass within each; 1-D, fp64."""
        height, width = self.map.shape
        y = torch.arange(height, dtype=torch.float64) + 0.5 - self.center[0]
        x = torch.arange(width, dtype=torch.float64) + 0.5 - self.center[1]
        # rounded, so that pixels at the same distance form one step despite rounding errors
        distance = (y[:, None].square() + x[None].square()).sqrt().round(decimals=9)
        radii, index = distance.flatten().unique(return_inverse=True)
        mass = torch.zeros_like(radii).index_add_(0, index, self.map.flatten()).cumsum(0)
        return radii, mass

    def radius(self, share: float) -> float:
        """Returns the smallest distance from the center, in pixels, that contains at least `share` of the mass.

        Raises:
            ValueError: `share` is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f'share must be in (0, 1], got {share}')
        radii, mass = self.mass_within()
        # the total may be slightly below one because of rounding
        index = int(torch.searchsorted(mass, share - 1e-12))
        return float(radii[min(index, len(radii) - 1)])


@contextmanager
def without_pools(model: nn.Module) -> Iterator[None]:
    """Context manager that turns off every context pool of a model.

    A pool with a gate (`init='identity'`) then returns `base(x)`. Other pools return their input; a strided pool keeps
    every `stride`-th pixel of it. The pools are restored on exit, even after an exception.

    Raises:
        ValueError: The model has no context pool.
    """
    pools = [pool for _, pool in mixers(model)]
    if not pools:
        raise ValueError(
            f'{type(model).__name__} has no context pool: build a cpool variant with at least one position')

    on_tokens = {pool: pool.on_tokens for pool in pools}

    def off(pool: Mixer2d) -> Callable[[Tensor], Tensor]:
        if pool.gamma is not None:
            return pool.base
        return lambda x: x[..., ::pool.stride, ::pool.stride]

    try:
        for pool in pools:
            # set on the instance; maps and tokens in every layout go through it
            pool.__dict__.update(mix_gated=off(pool), on_tokens=False)
        yield
    finally:
        for pool in pools:
            pool.__dict__.pop('mix_gated', None)
            pool.on_tokens = on_tokens[pool]


def _features(model: nn.Module, images: Tensor, layer: str | int | None) -> Tensor:
    """Returns the feature map `(B, C, h, w)` of `layer`."""
    if layer is None and not hasattr(model, 'forward_intermediates'):
        return model(images)
    if isinstance(layer, str):
        modules = dict(model.named_modules())
        if layer not in modules or not layer:
            raise ValueError(f'the model has no layer {layer!r}: name a module, or give an index of '
                             'forward_intermediates')
        seen: list[Any] = []
        handle = modules[layer].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(images)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f'layer {layer!r} did not run: name a module that the forward pass calls')
        return seen[-1]
    if not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'{type(model).__name__} has no forward_intermediates, so layer {layer} is unknown: name a '
                         'module')
    forward: Any = model.forward_intermediates
    try:
        return forward(
            images, indices=[-1 if layer is None else layer], stop_early=True, output_fmt='NCHW',
            intermediates_only=True)[0]
    except (AssertionError, IndexError) as error:
        raise ValueError(f'the model has no layer number {layer} ({error}): use a smaller number') from error


def _unit(point: tuple[float, float] | None, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    if point is None:
        return grid[0] // 2, grid[1] // 2
    if len(point) != 2 or not all(0 <= value < side for value, side in zip(point, size, strict=True)):
        raise ValueError(f'point {tuple(point)} is not inside an image of {size[0]} x {size[1]} pixels '
                         '(height x width): choose 0 <= y < height and 0 <= x < width')
    return int(point[0] * grid[0] / size[0]), int(point[1] * grid[1] / size[1])


def effective_receptive_field(
        model: nn.Module,
        images: Tensor,
        layer: str | int | None = None,
        point: tuple[float, float] | None = None,
        pools: bool = True,
        probes: int = 8,
        seed: int = 0,
) -> ReceptiveField:
    """Computes how strongly one unit of a feature map depends on each pixel of the input.

    Each pixel of the result is the root mean square, over images, input channels and channels of the unit, of the
    gradient of the unit with respect to the pixel (after Luo et al., 2016, https://arxiv.org/abs/1701.04128). The mean
    over the unit's channels is estimated with random signs: for independent `v_c` of +1 and -1, the expected squared
    gradient of `sum_c v_c f_c` is the sum of the squared gradients of all channels; without signs, channels would
    cancel. With one channel the map is exact. Gradients through weights and supports are included.

    The model runs in eval mode; its modes, parameters and gradients do not change.

    Args:
        model: An eager model.
        images: Input of the model, `(B, C, H, W)` float, on its device.
        layer: Index of timm's `forward_intermediates`, name of a module that returns `(B, C, h, w)`, or None for the
            last feature map (the output of a model without `forward_intermediates`).
        point: (y, x) in pixels of the images, whose first pixel spans [0, 1]: selects the unit that contains it. None
            selects the middle unit, `(h // 2, w // 2)`.
        pools: False turns the context pools off, see `without_pools`.
        probes: Number of random sign vectors per image.
        seed: Seed of the signs.

    Raises:
        ValueError: There is no such layer, its output is not a map, the point is outside the images, `probes` is below
            1, there are no images, the unit does not depend on the input, the gradient is not finite, or `pools=False`
            and the model has no pools.
    """
    if probes < 1:
        raise ValueError(f'probes must be >= 1, got {probes}')
    if images.ndim != 4 or not len(images):
        raise ValueError(f'images must be (B, C, H, W) with B >= 1, got {tuple(images.shape)}')
    if not pools:
        with without_pools(model):
            return effective_receptive_field(model, images, layer, point, True, probes, seed)
    size = images.shape[-2], images.shape[-1]
    total = torch.zeros(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for image in images:  # one at a time, so that memory does not grow with the number of images
        with kept_modes(model), torch.enable_grad():
            leaf = image.detach()[None].clone().requires_grad_()
            features = _features(model, leaf, layer)
            if not isinstance(features, Tensor) or features.ndim != 4:
                shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f'layer {layer!r} returns {shape}, not a map (B, C, h, w): name another module, or '
                                 'give an index of forward_intermediates')
            grid = features.shape[-2], features.shape[-1]
            unit = _unit(point, size, grid)
            channels = features[0, :, unit[0], unit[1]]
            for retain in [True] * (probes - 1) + [False]:
                signs = torch.randint(2, channels.shape, generator=generator).mul(2).sub(1).to(channels)
                gradient = _gradient(channels, leaf, signs, retain)
                if gradient is None:
                    raise ValueError(f'layer {layer!r} does not depend on the images: name a layer after the input')
                total += gradient[0].detach().double().square().sum(0).cpu()
    return _field(total, layer, unit, grid)


def _gradient(channels: Tensor, leaf: Tensor, signs: Tensor, retain_graph: bool) -> Tensor | None:
    """Returns the gradient of `channels @ signs` with respect to `leaf`, or None if they do not depend on it."""
    if not channels.requires_grad:
        return None
    return torch.autograd.grad(channels, leaf, signs, retain_graph=retain_graph, allow_unused=True)[0]


def _field(squared: Tensor, layer: str | int | None, unit: tuple[int, int], grid: tuple[int, int]) -> ReceptiveField:
    """Normalizes a map of summed squared gradients, and finds its center."""
    rms = squared.sqrt()
    mass = float(rms.sum())
    if not 0 < mass < float('inf'):
        raise ValueError(f'the gradient of layer {layer!r} sums to {mass}: unit {unit} depends on no pixel, or the '
                         'model returns NaN or infinity')
    energy = squared / squared.sum()
    y, x = (float(energy.sum(1 - axis) @ (torch.arange(squared.shape[axis]) + 0.5).double()) for axis in (0, 1))
    return ReceptiveField(rms / mass, unit, grid, (y, x))
