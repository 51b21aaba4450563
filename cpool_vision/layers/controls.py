"""Mixers that take a context pool's place in controlled comparisons: what it would be without its adaptive parts."""
from typing import Any

import torch
from torch import Tensor, nn

from .context_pool import ContextPool2d, Subsample2d
from .naflex_context_pool import NaFlexContextPool
from .token_context_pool import TokenContextPool

# Mixers that have no predictor, by the size of their kernel.
_KERNELS = {'identity': 1, 'average': 3, 'depthwise3': 3, 'depthwise7': 7}
MIXERS = ('context', 'uniform', 'fixed', 'layer', *_KERNELS)


class _Control(ContextPool2d):
    """`ContextPool2d` with a part of it replaced; see `ControlPool2d`."""

    def __init__(self, dim: int, *, mixer: str, **kwargs: Any) -> None:
        if mixer not in MIXERS[1:]:
            raise ValueError(f'mixer of a control must be one of {MIXERS[1:]}, got {mixer!r}')
        super().__init__(dim, **kwargs)
        self.mixer = mixer
        weight = self.reduce.weight
        if mixer == 'layer':
            self.support = nn.Parameter(torch.empty_like(weight[:1, :self.groups]))
        elif mixer in _KERNELS:
            size = _KERNELS[mixer]
            del self.reduce, self.act, self.predict
            if mixer == 'identity':
                self.local: nn.Module = Subsample2d(self.stride)
            elif mixer == 'average':
                self.local = nn.AvgPool2d(size, self.stride, size // 2, count_include_pad=False)
            else:
                self.local = nn.Conv2d(
                    dim, dim, size, self.stride, size // 2, groups=dim, device=weight.device, dtype=weight.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Like `ContextPool2d`; supports of a layer start at `support_init` of the largest."""
        mixer = getattr(self, 'mixer', None)
        if mixer not in _KERNELS:
            super().reset_parameters()
            if mixer == 'layer':
                nn.init.constant_(self.support, self.initial_raw_support)
            return
        if isinstance(self.local, nn.Conv2d):
            nn.init.dirac_(self.local.weight, groups=self.dim)
            if self.local.bias is not None:
                nn.init.zeros_(self.local.bias)
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)

    def predict_maps(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in `ContextPool2d`, without the part that the control takes away.

        Raises:
            TypeError: The mixer predicts nothing.
        """
        if self.mixer in _KERNELS:
            raise TypeError(f'mixer {self.mixer!r} has neither pooling weights nor supports')
        weight_logits, sigma = super().predict_maps(x, present)
        if self.mixer == 'uniform':
            return torch.zeros_like(weight_logits), sigma
        if self.mixer == 'layer':
            raw = self.support.view(1, -1, 1, 1).expand_as(sigma)
        else:
            raw = torch.full_like(sigma, self.initial_raw_support)
        sigma = torch.ops.cpool_vision.support_size(raw, x.shape[-2], x.shape[-1], self.ratio, self.floor)
        return weight_logits, sigma

    def mix(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        if self.mixer not in _KERNELS:
            return super().mix(x, present)
        y = self.local(x)
        if self.mixer == 'average' and present is not None:
            y = y / self.local(present.type_as(x)).clamp(min=1e-3)
        return y

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, mixer={self.mixer!r}'


class ControlPool2d(_Control):
    """A control in the place of `ContextPool2d`: `(B, C, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`.

    Args:
        dim: Channels C.
        mixer: One of `MIXERS` but `context`. `uniform`: equal pooling weights, predicted supports. `fixed`: predicted
            weights, every support `support_init` of the largest. `layer`: predicted weights, one learned support per
            group for the whole map. `identity`: the input itself, every `stride`-th pixel. `average`: the mean of 3 x 3
            pixels.
            `depthwise3`, `depthwise7`: a depthwise convolution that starts as the identity.
        **kwargs: Further arguments of `ContextPool2d`.

    Raises:
        ValueError: Unknown `mixer`, or an argument is out of range.
    """


class TokenControlPool(_Control, TokenContextPool):
    """A control in the place of `TokenContextPool`, for tokens `(B, P + H * W, C)`.

    Args:
        dim: Channels C.
        mixer: As in `ControlPool2d`.
        **kwargs: Further arguments of `TokenContextPool`.

    Raises:
        ValueError: Unknown `mixer`, or an argument is out of range.
    """


class NaFlexControlPool(_Control, NaFlexContextPool):
    """A control in the place of `NaFlexContextPool`, for tokens of images on grids of their own.

    Args:
        dim: Channels C.
        mixer: As in `ControlPool2d`.
        **kwargs: Further arguments of `NaFlexContextPool`.

    Raises:
        ValueError: Unknown `mixer`, or an argument is out of range.
    """


_LAYOUTS: dict[str, tuple[type[ContextPool2d], type[_Control]]] = {
    'map': (ContextPool2d, ControlPool2d),
    'tokens': (TokenContextPool, TokenControlPool),
    'naflex': (NaFlexContextPool, NaFlexControlPool),
}


def make_pool(dim: int, *, mixer: str = 'context', layout: str = 'map', **kwargs: Any) -> ContextPool2d:
    """The module that mixes in a model's slot: a context pool, or a control in its place.

    Args:
        dim: Channels.
        mixer: One of `MIXERS`.
        layout: `map` for `(B, C, H, W)`; `tokens` for `(B, P + H * W, C)`; `naflex` for `(B, P + N, C)` of images on
            grids of their own.
        **kwargs: Arguments of `ContextPool2d`, `TokenContextPool` or `NaFlexContextPool`.

    Raises:
        ValueError: Unknown `mixer` or `layout`, or an argument is out of range.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f'layout must be one of {tuple(_LAYOUTS)}, got {layout!r}')
    pool, control = _LAYOUTS[layout]
    return pool(dim, **kwargs) if mixer == 'context' else control(dim, mixer=mixer, **kwargs)
