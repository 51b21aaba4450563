"""Runs a model on a probe image to find out where a pool works."""
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inspect.maps import kept_modes
from .attach import NAME, attach, detach
from .places import Features, NoPlaceError, Place, entry, run_eval

_logger = logging.getLogger(__name__)

# With random weights, the ratio is 1 to 3 for tokens in raster order, and over 500 in Hiera, whose tokens are not.
MISPLACED = 10


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
    """Returns an image of noise in the model's dtype and on its device; size and channels default to the model's."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise NoPlaceError(f'{type(model).__name__} has no parameters: pass a network')
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    in_chans = in_chans or getattr(model, 'in_chans', None) or (cfg.get('input_size') or (3,))[0]
    # a separate generator, so that the caller's random numbers do not change
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, in_chans, *_image_size(model, size), generator=generator, device='cpu')
    return x.to(device=parameter.device, dtype=parameter.dtype)


def run(model: nn.Module, x: Tensor) -> Any:
    """Same as `run_eval`, with an error that says what to do.

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
    """Replaces a pool in a probe: counts its calls and adds `shift` times a fixed pattern to the map."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.calls = 0
        self.fits = True
        self.shift: Tensor | None = None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        channels = {'NCHW': 1, 'NHWC': -1, 'NLC': -1}[self.features.layout]
        ndim = 3 if self.features.layout == 'NLC' else 4
        self.fits = self.fits and not args and not kwargs and isinstance(x, Tensor) and x.ndim == ndim \
            and x.shape[channels] == self.features.dim
        if self.shift is None or not self.fits:
            return x
        generator = torch.Generator().manual_seed(1)
        y = x + self.shift * torch.randn(x.shape, generator=generator).to(x)
        if self.features.layout == 'NLC' and self.features.prefix:
            y = torch.cat([x[:, :self.features.prefix], y[:, self.features.prefix:]], dim=1)
        return y


def _runs_alone(model: nn.Module, x: Tensor, place: Place) -> bool | None:
    module, counter = model.get_submodule(place.name), _Counter(place.features)
    module.add_module(NAME, counter)
    try:
        run_eval(model, x)
    except Exception:  # the module calls its children with something other than the map
        return None
    finally:
        detach(module)
    return None if counter.calls > 1 or not counter.fits else counter.calls == 1


def runs_children(model: nn.Module, x: Tensor, places: list[Place]) -> list[bool | None]:
    """Returns for each place whether its module calls an added child on its map; None if it calls it otherwise."""
    modules = [model.get_submodule(place.name) for place in places]
    counters = [_Counter(place.features) for place in places]
    for module, counter, place in zip(modules, counters, places, strict=True):
        if place.side == 'output':
            module.add_module(NAME, counter)
    try:
        run_eval(model, x)
        odd = any(counter.calls > 1 or not counter.fits for counter in counters)
    except Exception:
        odd = True
    finally:
        for module in modules:
            detach(module)
    if not odd:
        return [counter.calls == 1 for counter in counters]
    return [_runs_alone(model, x, place) if place.side == 'output' else False for place in places]


@contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """Context manager for eval mode without gradients of parameters; restores both on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with kept_modes(model), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def reaches_output(model: nn.Module, x: Tensor, places: list[Place], run_alone: list[bool]) -> list[bool]:
    """Returns for each place whether a change of the map there changes the model's output."""
    counters = [_Counter(place.features) for place in places]
    shifts = [torch.zeros((), device=x.device, dtype=x.dtype, requires_grad=True) for _ in places]
    modules = [model.get_submodule(place.name) for place in places]
    try:
        for module, counter, place, runs in zip(modules, counters, places, run_alone, strict=True):
            attach(module, counter, place.side, runs, place.index)
        for counter, shift in zip(counters, shifts, strict=True):
            counter.shift = shift
        with _fixed(model):
            image = x.clone().requires_grad_()
            generator = torch.Generator().manual_seed(2)
            outputs = [output for output in tensors(model(image)) if output.requires_grad]
            total = torch.stack([
                (output * torch.randn(output.shape, generator=generator).to(output)).sum() for output in outputs]).sum()
            of_image, *grads = torch.autograd.grad(total, [image, *shifts], allow_unused=True)
    except Exception as error:
        _logger.debug('%s has no gradients with respect to its places (%s)', type(model).__name__, error)
        return [True] * len(places)
    finally:
        for module in modules:
            detach(module)
    # with a zero-initialized classifier, even the image does not affect the output
    blind = of_image is None or not bool(of_image.any())
    return [grad is not None and (blind or bool(grad != 0)) for grad in grads]


def in_raster_order(model: nn.Module, x: Tensor, places: list[Place]) -> list[bool]:
    """Returns for each place whether its tokens are in raster order; True for maps.

    Some networks keep their tokens in another order, in which a pool would mix distant parts of the image. The gradient
    of an off-center token with respect to the image is compared between its own position on the grid and all others;
    the tokens are not in raster order if it is more than `MISPLACED` times larger elsewhere.
    """
    tokens = [i for i, place in enumerate(places) if place.features.layout == 'NLC']
    firsts = {places[i].features.grid: i for i in reversed(tokens)}
    seen: dict[int, Tensor | None] = {}

    def hook_of(i: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            value: Any = output if places[i].side == 'output' else args or list(kwargs.values())
            seen[i] = entry(value, places[i].index)
        return hook

    answer = [True] * len(places)
    handles = [model.get_submodule(places[i].name).register_forward_hook(hook_of(i), with_kwargs=True)
               for i in firsts.values()]
    try:
        with _fixed(model):
            image = x.clone().requires_grad_()
            model(image)
            for grid, i in firsts.items():
                rows, columns = grid
                row, column = rows // 3, columns * 3 // 4
                value: Any = seen[i]
                token = value[0, places[i].features.prefix + row * columns + column]
                grad, = torch.autograd.grad(token.square().sum(), image, retain_graph=True, allow_unused=True)
                if grad is None or not grad.any():
                    continue
                energy = F.adaptive_avg_pool2d(grad.abs().sum(1, keepdim=True).float(), grid)[0, 0]
                near = energy[max(row - 1, 0):row + 2, max(column - 1, 0):column + 2].max()
                if energy.max() > MISPLACED * near:
                    for j in tokens:
                        answer[j] = answer[j] and places[j].features.grid != grid
    except Exception as error:
        _logger.debug('the tokens of %s have no gradients with respect to the image (%s)', type(model).__name__, error)
    finally:
        for handle in handles:
            handle.remove()
    return answer


def tensors(value: object) -> list[Tensor]:
    """Returns all tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for entry in entries for tensor in tensors(entry)]


@torch.no_grad()
def equal(a: object, b: object) -> bool:
    """Returns whether two outputs are bit-identical; on the meta device, whether their shapes are equal."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(p.shape == q.shape and (p.is_meta or bool(torch.equal(p, q))) for p, q in pairs)


def finite(a: object) -> bool:
    """Returns whether an output contains neither NaN nor infinity."""
    return all(tensor.is_meta or bool(tensor.isfinite().all()) for tensor in tensors(a))
