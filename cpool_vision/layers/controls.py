"""Mixers that take a context pool's place in controlled comparisons: what it would be without its adaptive parts."""
from typing import Any

import torch
from torch import Tensor, nn

from .context_pool import ContextPool2d
from .mixer import Mixer2d, Subsample2d
from .naflex_context_pool import NaFlexContextPool, NaFlexMixer
from .token_context_pool import TokenContextPool, TokenMixer

ABLATIONS = ('uniform', 'fixed', 'layer')
# Mixers without a predictor, by the side of their kernel.
KERNELS = {'identity': 1, 'average': 3, 'depthwise3': 3, 'depthwise7': 7}


class AblatedPool2d(ContextPool2d):
    """A context pool one part of which does not adapt: `(B, C, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`.

    Args:
        dim: Channels C.
        mixer: `uniform`: equal pooling weights, predicted supports. `fixed`: predicted weights, every support
            `support_init` of the largest. `layer`: predicted weights, one learned support per group for the whole map.
        **kwargs: Further arguments of `ContextPool2d`.

    Raises:
        ValueError: Unknown `mixer`, or an argument is out of range.
    """

    def __init__(self, dim: int, *, mixer: str, **kwargs: Any) -> None:
        if mixer not in ABLATIONS:
            raise ValueError(f'mixer of an ablated pool must be one of {ABLATIONS}, got {mixer!r}')
        super().__init__(dim, **kwargs)
        self.mixer = mixer
        support = torch.empty_like(self.reduce.weight[0, :self.groups].view(1, -1, 1, 1)).detach()
        if mixer == 'layer':
            self.support = nn.Parameter(support)
        else:
            self.register_buffer('support', support, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Like `ContextPool2d`; supports of a layer start at `support_init` of the largest."""
        super().reset_parameters()
        if hasattr(self, 'support'):
            self.set_initial_supports(self.support.view(-1))

    def predict_maps(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in `ContextPool2d`, without the part that does not adapt."""
        weight_logits, sigma = super().predict_maps(x, present)
        if self.mixer == 'uniform':
            return torch.zeros_like(weight_logits), sigma
        raw = self.support.expand_as(sigma)
        return weight_logits, torch.ops.cpool_vision.support_size(raw, x, self.ratio, self.floor)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, mixer={self.mixer!r}'


class LocalMixer2d(Mixer2d):
    """A mixer of fixed reach, without a predictor: `(B, C, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`.

    Args:
        dim: Channels C.
        mixer: `identity`: the input itself, every `stride`-th pixel. `average`: the mean of 3 x 3 pixels.
            `depthwise3`, `depthwise7`: a depthwise convolution that starts as the identity.
        stride, init, gate, base, device, dtype: As in `Mixer2d`.

    Raises:
        ValueError: Unknown `mixer`, or an argument is out of range.
    """

    def __init__(
            self,
            dim: int,
            *,
            mixer: str,
            stride: int = 1,
            init: str = 'paper',
            gate: bool = False,
            base: nn.Module | None = None,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        if mixer not in KERNELS:
            raise ValueError(f'mixer of a local mixer must be one of {tuple(KERNELS)}, got {mixer!r}')
        super().__init__(dim, stride=stride, init=init, gate=gate, base=base, device=device, dtype=dtype)
        self.mixer = mixer
        size = KERNELS[mixer]
        if mixer == 'identity':
            self.local: nn.Module = Subsample2d(stride)
        elif mixer == 'average':
            self.local = nn.AvgPool2d(size, stride, size // 2, count_include_pad=False)
        else:
            self.local = nn.Conv2d(dim, dim, size, stride, size // 2, groups=dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes a convolution the identity, and closes the gate."""
        super().reset_parameters()
        if isinstance(self.local, nn.Conv2d):
            nn.init.dirac_(self.local.weight, groups=self.dim)
            if self.local.bias is not None:
                nn.init.zeros_(self.local.bias)

    def mix(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        y = self.local(x)
        if self.mixer == 'average' and present is not None:
            y = y / self.local(present.type_as(x)).clamp(min=1e-3)
        return y

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, mixer={self.mixer!r}'


class TokenAblatedPool(AblatedPool2d, TokenContextPool):
    """`AblatedPool2d` for tokens `(B, P + H * W, C)`; arguments of both classes."""


class NaFlexAblatedPool(AblatedPool2d, NaFlexContextPool):
    """`AblatedPool2d` for tokens of images on grids of their own; arguments of both classes."""


class TokenLocalMixer(TokenMixer, LocalMixer2d):
    """`LocalMixer2d` for tokens `(B, P + H * W, C)`; `num_prefix_tokens` and `grid_size` as in `TokenContextPool`."""


class NaFlexLocalMixer(NaFlexMixer, LocalMixer2d):
    """`LocalMixer2d` for tokens of images on grids of their own; `num_prefix_tokens` as in `NaFlexContextPool`."""
