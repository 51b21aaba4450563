"""Base class of every module in a pool's slot: its stride, and the gate that blends it with what it replaced."""
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

INITS = ('paper', 'identity')


class Subsample2d(nn.Module):
    """Keeps every `stride`-th row and column: `(B, C, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`.

    The base of a strided `ContextPool2d` after a convolution whose stride was removed: a convolution at stride 1
    followed by this equals the convolution at `stride`, up to the choice of its kernel.
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f'stride must be at least 1, got {stride}')
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::self.stride, ::self.stride]

    def extra_repr(self) -> str:
        return f'stride={self.stride}'


def check_map(x: Tensor, dim: int) -> None:
    """Raises ValueError where `x` is not `(B, C, H, W)` with `dim` channels."""
    if x.ndim != 4:
        remedy = 'add a batch dimension, x[None]' if x.ndim == 3 else 'reshape it'
        raise ValueError(f'expected a map (B, {dim}, H, W), got shape {tuple(x.shape)}: {remedy}')
    if x.shape[1] != dim:
        raise ValueError(f'expected {dim} channels, got a map of shape {tuple(x.shape)}: build the layer with '
                         f'dim={x.shape[1]}')


class Mixer2d(nn.Module):
    """Base of the modules that mix the pixels of a map: context pools, and the controls they are compared with.

    A subclass defines `mix`. With a gate the output is `base(x) + gamma * (mix(x) - base(x))`, else `mix(x)`.
    `on_tokens` says whether it works on tokens directly, without `mix_gated`.

    Args:
        dim: Channels C of the input `(B, C, H, W)`.
        stride: Output cells are `stride` pixels apart; the output is `(B, C, ceil(H / stride), ceil(W / stride))`.
        init: `paper` outputs the mixer itself. `identity` adds a gate per channel that starts at zero, so that a new
            module returns exactly `base(x)`.
        gate: Adds the gate with `init='paper'` too, where it starts at one: a new module outputs the mixer itself,
            and the gate may learn to sharpen (`gamma < 0`) or to exaggerate (`gamma > 1`).
        base: What the gate blends with; the identity itself at stride 1 if None. Not kept without a gate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An argument is out of range, or a gate with `stride > 1` has no `base`.
    """

    on_tokens = False

    def __init__(
            self,
            dim: int,
            stride: int = 1,
            init: str = 'paper',
            gate: bool = False,
            base: nn.Module | None = None,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f'dim must be at least 1, got {dim}')
        if stride < 1:
            raise ValueError(f'stride must be at least 1, got {stride}')
        if init not in INITS:
            raise ValueError(f'init must be one of {INITS}, got {init!r}')
        gated = gate or init == 'identity'
        cause = 'gate=True' if gate else f'{init=}'
        if gated and stride > 1 and base is None:
            raise ValueError(
                f'{cause} with stride={stride} needs base: pass the pooling module being replaced, '
                f'for example nn.MaxPool2d or Subsample2d({stride})')
        self.dim = dim
        self.stride = stride
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if gated else None
        self.base = base if base is not None and gated else nn.Identity()

    def reset_parameters(self) -> None:
        """Sets the gate to zero, or to one with `init='paper'`."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, 0. if self.init == 'identity' else 1.)

    def init_weights(self) -> None:
        """The hook by which timm's models reinitialize their layers."""
        self.reset_parameters()

    def mix(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """The map `x` mixed, without base and gate: `(B, C, H, W)` to `(B, C, Ho, Wo)`.

        Pixels where the boolean `(B, 1, H, W)` `present` is false count as outside the map; they must be zero in `x`.
        """
        raise NotImplementedError('a mixer defines mix')

    def mix_gated(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """The mixed map after the gate, `(B, C, H, W)` to `(B, C, Ho, Wo)`; `present` as in `mix`."""
        if not torch.jit.is_scripting():
            if not isinstance(x, fx.Proxy):
                check_map(x, self.dim)
        return self.mix_and_blend(x, present)

    def mix_and_blend(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """`mix_gated` of a map that was checked."""
        return self.blend(x, self.mix(x, present))

    def blend(self, x: Tensor, y: Tensor) -> Tensor:
        """The mixed map `y` of `x` behind the gate."""
        if self.gamma is not None:
            base = self.base(x)
            y = torch.lerp(base, y.type_as(base), self.gamma.view(-1, 1, 1).type_as(base))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.mix_gated(x)

    def extra_repr(self) -> str:
        return f'{self.dim}, stride={self.stride}, init={self.init!r}, gate={self.gamma is not None}'


def mixers(model: nn.Module) -> Iterator[tuple[str, Mixer2d]]:
    """Names and modules of every context pool, and of every control, in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, Mixer2d):
            yield name, module
