"""Controls: mixers that replace a context pool in comparisons and lack some of its adaptive parts."""
from typing import Any

import torch
from torch import Tensor, nn

from .context_pool import ContextPool2d
from .mixer import Mixer2d, Subsample2d
from .naflex_context_pool import NaFlexContextPool, NaFlexMixer
from .rivals import (
    DeformableDepthwise2d,
    GaussianBlur2d,
    blur_pool,
    dilated_with_learned_spacings,
    selective_kernel,
)
from .token_context_pool import TokenContextPool, TokenMixer

ABLATIONS = ('uniform', 'fixed', 'layer')
# Mixers that are not context pools.
LOCAL = ('identity', 'average', 'depthwise3', 'depthwise7', 'blur', 'gaussian', 'deform', 'dcls', 'selective')


class AblatedPool2d(ContextPool2d):
    """A context pool without one of its adaptive parts: `(B, C, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`.

    Args:
        dim: Channels C.
        mixer: `uniform`: equal pooling weights, predicted supports. `fixed`: predicted weights, every support
            `support_init` of the largest. `layer`: predicted weights, one learned support per group for the whole map.
        **kwargs: More arguments of `ContextPool2d`.

    Raises:
        ValueError: Unknown `mixer`, or an argument is out of range.
    """

    def __init__(self, dim: int, *, mixer: str, **kwargs: Any) -> None:
        if mixer not in ABLATIONS:
            raise ValueError(f'mixer of an ablated pool must be one of {ABLATIONS}, got {mixer!r}')
        super().__init__(dim, **kwargs)
        self.mixer = mixer
        support = self.predict.weight.new_empty(1, self.support_groups, 1, 1)
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

    def read_maps(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """As in `ContextPool2d`, without the part that does not adapt."""
        if self.mixer != 'uniform':
            support = self.support.expand(raw.shape[0], -1, raw.shape[2], raw.shape[3])
            raw = torch.cat([raw[:, :self.groups].type_as(support), support], dim=1)
        weight_logits, sigma = super().read_maps(raw)
        return torch.zeros_like(weight_logits) if self.mixer == 'uniform' else weight_logits, sigma

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, mixer={self.mixer!r}'


class LocalMixer2d(Mixer2d):
    """A mixer that is not a context pool: `(B, C, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`.

    Args:
        dim: Channels C.
        mixer: `identity`: the input itself, every `stride`-th pixel. `average`: the mean of 3 x 3 pixels.
            `depthwise3`, `depthwise7`: a depthwise convolution that starts as the identity. `blur`: timm's
            `BlurPool2d`, a constant binomial 3x3 filter, for maps of at least 2 x 2 pixels. `gaussian`: a separable
            Gaussian of constant width without parameters. `deform`: a deformable depthwise 3x3 convolution that starts
            as the identity. `dcls`: a depthwise convolution of nine Gaussian taps at learned positions (needs the
            package `dcls`). `selective`: timm's `SelectiveKernel` of depthwise convolutions.
        ratio, floor, support_init: The width of `gaussian`: the initial supports of a context pool with these values.
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
            ratio: float = 0.1,
            floor: float = 0.1,
            support_init: float = 0.5,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        if mixer not in LOCAL:
            raise ValueError(f'mixer of a local mixer must be one of {LOCAL}, got {mixer!r}')
        super().__init__(dim, stride=stride, init=init, gate=gate, base=base, device=device, dtype=dtype)
        self.mixer = mixer
        dd = {'device': device, 'dtype': dtype}
        if mixer == 'identity':
            self.local: nn.Module = Subsample2d(stride)
        elif mixer == 'average':
            self.local = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        elif mixer == 'blur':
            self.local = blur_pool(stride, **dd)
        elif mixer == 'gaussian':
            self.local = GaussianBlur2d(stride, ratio * support_init, floor)
        elif mixer == 'deform':
            self.local = DeformableDepthwise2d(dim, stride, **dd)
        elif mixer == 'dcls':
            self.local = dilated_with_learned_spacings(dim, stride, **dd)
        elif mixer == 'selective':
            self.local = selective_kernel(dim, stride, **dd)
        else:
            size = int(mixer[-1])
            self.local = nn.Conv2d(dim, dim, size, stride, size // 2, groups=dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the gate, and gives the mixer its initial parameters: convolutions are the identity."""
        super().reset_parameters()
        if isinstance(self.local, DeformableDepthwise2d):
            self.local.reset_parameters()
        elif isinstance(self.local, nn.Conv2d):
            nn.init.dirac_(self.local.weight, groups=self.dim)
            if self.local.bias is not None:
                nn.init.zeros_(self.local.bias)

    def mix(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        if self.mixer == 'blur' and min(x.shape[-2:]) < 2:
            raise ValueError(f"mixer 'blur' mirrors the border of a map and needs at least 2 x 2 pixels, got "
                             f'{x.shape[-2]} x {x.shape[-1]}: choose another mixer or larger images')
        y = self.local(x)
        if present is not None and self.mixer in ('average', 'blur', 'gaussian'):
            y = y / self.local(present.type_as(x)).clamp(min=1e-3)
        return y

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, mixer={self.mixer!r}'


class TokenAblatedPool(AblatedPool2d, TokenContextPool):
    """`AblatedPool2d` for tokens `(B, P + H * W, C)`; arguments of both classes."""


class NaFlexAblatedPool(AblatedPool2d, NaFlexContextPool):
    """`AblatedPool2d` for tokens of images with their own grids; arguments of both classes."""


class TokenLocalMixer(TokenMixer, LocalMixer2d):
    """`LocalMixer2d` for tokens `(B, P + H * W, C)`; `num_prefix_tokens` and `grid_size` as in `TokenContextPool`."""


class NaFlexLocalMixer(NaFlexMixer, LocalMixer2d):
    """`LocalMixer2d` for tokens of images with their own grids; `num_prefix_tokens` as in `NaFlexContextPool`."""
