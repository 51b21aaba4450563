"""Runs of a model on one probe image, by which it is found out how a pool fits in."""
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attach import NAME, attach, detach
from .places import Features, NoPlaceError, Place, run_eval

_logger = logging.getLogger(__name__)


def _image_size(model: nn.Module, size: int | Sequence[int] | None) -> tuple[int, int]:
    if size is None:
        traits = getattr(model, '_traits', None) or {}
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        size = traits.get('img_size') or (cfg.get('input_size') or (3, 224, 224))[-2:]
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f'img_size must be a positive number of pixels or a pair (height, width), got {size!r}')
    return pair


def probe_image(model: nn.Module, size: int | Sequence[int] | None, in_chans: int | None) -> Tensor:
    """One image of noise on the device and in the dtype of the model; sizes left out are the model's own."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise NoPlaceError(f'{type(model).__name__} has no parameters: pass a network')
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    in_chans = in_chans or getattr(model, 'in_chans', None) or (cfg.get('input_size') or (3,))[0]
    # a generator of its own, so that the caller's random numbers stay what they were
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, in_chans, *_image_size(model, size), generator=generator, device='cpu')
    return x.to(device=parameter.device, dtype=parameter.dtype)


def run(model: nn.Module, x: Tensor) -> Any:
    """`run_eval` with an error that says what to do.

    Raises:
        NoPlaceError: The model does not run on `x`.
    """
    try:
        return run_eval(model, x)
    except Exception as error:
        raise NoPlaceError(
            f'{type(model).__name__} does not run on a batch of images of shape {tuple(x.shape)} '
            f'({type(error).__name__}: {" ".join(str(error).split())[:200]}): pass img_size and in_chans, or a model '
            f'that takes one tensor (B, C, H, W)') from error


class _Counter(nn.Module):
    """Stands in for a pool during a probe: counts its calls and adds `shift` times a fixed pattern to the map."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.calls = 0
        self.shift: Tensor | None = None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.shift is None or not isinstance(x, Tensor):
            return x
        generator = torch.Generator().manual_seed(1)
        y = x + self.shift * torch.randn(x.shape, generator=generator).to(x)
        if self.features.layout == 'NLC' and self.features.prefix:
            y = torch.cat([x[:, :self.features.prefix], y[:, self.features.prefix:]], dim=1)
        return y


def runs_children(model: nn.Module, x: Tensor, places: list[Place]) -> list[bool]:
    """For each place, whether its module runs an added child by itself, exactly once."""
    counters = [_Counter(place.features) for place in places]
    modules = [model.get_submodule(place.name) for place in places]
    answers = []
    for module, counter, place in zip(modules, counters, places, strict=True):
        if place.side == 'output' and not isinstance(module, nn.ModuleList):
            module.add_module(NAME, counter)
    try:
        try:
            run_eval(model, x)
            answers = [counter.calls == 1 for counter in counters]
        except Exception:  # a module that hands its children something else cannot run a pool by itself
            answers = [False] * len(places)
    finally:
        for module in modules:
            detach(module)
    return answers


def reaches_output(model: nn.Module, x: Tensor, places: list[Place], native: list[bool]) -> list[bool]:
    """For each place, whether a change of the map there changes the model's output at all."""
    counters = [_Counter(place.features) for place in places]
    shifts = [torch.zeros((), device=x.device, dtype=x.dtype, requires_grad=True) for _ in places]
    modules = [model.get_submodule(place.name) for place in places]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, counter, place, runs in zip(modules, counters, places, native, strict=True):
            attach(module, counter, place.side, runs)
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for counter, shift in zip(counters, shifts, strict=True):
            counter.shift = shift
        with torch.enable_grad():
            output = model(x)
            while isinstance(output, (tuple, list)):
                output = output[0]
            pattern = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
            grads = torch.autograd.grad((output * pattern).sum(), shifts, allow_unused=True)
    except Exception as error:
        _logger.debug('the places of %s cannot be told apart by gradients (%s)', type(model).__name__, error)
        return [True] * len(places)
    finally:
        for module in modules:
            detach(module)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
    reached = [grad is not None and bool(grad != 0) for grad in grads]
    # a classifier that starts at zero hides everything
    return reached if any(reached) else [grad is not None for grad in grads]


@torch.no_grad()
def equal(a: Any, b: Any) -> bool:
    """Whether two outputs are equal to the bit; on the meta device, in shape."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and (a.is_meta or bool(torch.equal(a, b)))
    if isinstance(a, (tuple, list)):
        return all(equal(p, q) for p, q in zip(a, b, strict=True))
    return True


def finite(a: Any) -> bool:
    """Whether an output holds neither NaN nor infinity."""
    if isinstance(a, Tensor):
        return a.is_meta or bool(a.isfinite().all())
    return all(finite(p) for p in a) if isinstance(a, (tuple, list)) else True
