"""Context pooling of feature maps: a lean predictor of weights and supports in front of the operator."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cpool_vision.ops  # noqa: F401  (registers torch.ops.cpool_vision)
from cpool_vision.ops.backends import BACKENDS

from .mixer import Mixer2d


def default_hidden_dim(dim: int) -> int:
    """Width of the predictor: a sixteenth of `dim`, rounded to a multiple of 8, at least 16."""
    return max(16, (dim // 16 + 4) // 8 * 8)


def as_fractions(support_init: float | Sequence[float], groups: int) -> tuple[float, ...]:
    """`support_init` of `ContextPool2d` as one fraction per group: the same for all, or a pair spread geometrically."""
    pair = (support_init, support_init) if isinstance(support_init, (int, float)) else tuple(support_init)
    if len(pair) != 2 or not all(0 < fraction < 1 for fraction in pair):
        raise ValueError(f'support_init must lie between 0 and 1 (a fraction of the largest support), or be a pair of '
                         f'such fractions, got {support_init}')
    low, high = pair
    return tuple(low * (high / low) ** (i / max(1, groups - 1)) for i in range(groups))


class ContextPool2d(Mixer2d):
    """Replaces each pixel by a weighted mean of a neighbourhood whose size the features choose themselves.

    A predictor of two convolutions (1x1 from `dim` to `hidden_dim`, activation, 3x3 to `2 * groups`) gives a weight
    logit per input pixel and a raw support `s` per output cell; the support is a Gaussian of standard deviation
    `sigma = floor + ratio * sqrt(H * W) * sigmoid(s)` input pixels. Then
    `y_i = sum_j softmax_j(l_j - |p_i - p_j|^2 / (2 sigma_i^2)) x_j` (Huang et al., ICML 2022,
    https://arxiv.org/abs/2207.01844).

    With `h = hidden_dim` and `G = groups` the layer has `dim * h + h + 18 * h * G + 2 * G` parameters (and `dim` more
    with a gate, `(k * k + 1) * dim` more with `depthwise=k`); its predictor costs `H * W * (dim * h + 18 * h * G)`
    multiply-adds, the pool itself up to `dim * (H * W) * (Ho * Wo)`, less where supports are small.

    Weight logits and supports are handed to the operator in the parameters' dtype or better (the supports never below
    fp32); the output has the dtype of the input. Under autocast the features are pooled in the autocast dtype, with
    logits and supports in fp32; the output has the autocast dtype, or with a gate that of its base.

    Args:
        dim: Channels C of the input `(B, C, H, W)`.
        stride: Output cells are `stride` pixels apart; the output is `(B, C, ceil(H / stride), ceil(W / stride))`.
        groups: Groups of channels with weights and supports of their own; divides `dim`.
        ratio: Largest support relative to the side of the map.
        floor: Smallest support, in pixels.
        init: `paper` outputs the pool itself. `identity` outputs `base(x) + gamma * (pool(x) - base(x))` with a gate
            per channel that starts at zero, so that a fresh layer returns exactly `base(x)`.
        gate: Adds the gate with `init='paper'` too, where it starts at one and is free in sign: from a mean over the
            neighbourhood (`gamma = 1`) to unsharp masking (`gamma < 0`).
        support_init: Mean support of a fresh layer relative to the largest, between 0 and 1. At 0.5 the raw supports
            start at zero; a small value starts near the identity and leaves room to grow. A pair spreads the groups
            geometrically from the first value to the second, as ALiBi does with the slopes of its heads.
        depthwise: Side of a depthwise convolution beside the pool, whose output is added to the pool's: the pool takes
            means, the convolution can look to one side and subtract. It starts at zero; 0 for none.
        hidden_dim: Width of the predictor; `max(16, dim // 16)` rounded to a multiple of 8 if None.
        base: What `identity` starts from; the identity itself at stride 1 if None. Not kept with `init='paper'`.
        act_layer: Activation of the predictor.
        backend: Implementation of the operator; None lets it choose. A request never falls back silently.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An argument is out of range, or `init='identity'` with `stride > 1` has no `base`.
    """

    backend: str | None
    mixer = 'context'

    def __init__(
            self,
            dim: int,
            stride: int = 1,
            groups: int = 1,
            ratio: float = 0.1,
            floor: float = 0.1,
            init: str = 'paper',
            gate: bool = False,
            support_init: float | Sequence[float] = 0.5,
            depthwise: int = 0,
            hidden_dim: int | None = None,
            base: nn.Module | None = None,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            backend: str | None = None,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, stride=stride, init=init, gate=gate, base=base, **dd)
        if groups < 1 or dim % groups:
            raise ValueError(
                f'groups must divide dim, got groups={groups} for dim={dim}: choose other groups or channels')
        if not ratio > 0:
            raise ValueError(f'ratio must be > 0 (a fraction of the side of the map), got {ratio}')
        if not floor > 0:
            raise ValueError(f'floor must be > 0 (pixels), got {floor}')
        if depthwise < 0 or depthwise % 2 == 0 and depthwise:
            raise ValueError(f'depthwise must be an odd side of a convolution, or 0 for none, got {depthwise}')
        if hidden_dim is not None and hidden_dim < 1:
            raise ValueError(f'hidden_dim must be at least 1 or None, got {hidden_dim}')
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f'unknown {backend=}: choose one of {", ".join(BACKENDS)}, or None')
        hidden_dim = hidden_dim or default_hidden_dim(dim)
        self.groups = groups
        self.ratio = float(ratio)
        self.floor = float(floor)
        as_fractions(support_init, groups)
        self.support_init = float(support_init) if isinstance(support_init, (int, float)) else tuple(support_init)
        self.backend = backend

        self.reduce = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = act_layer()
        self.predict = nn.Conv2d(hidden_dim, 2 * groups, 3, padding=1, **dd)
        self.depthwise = nn.Conv2d(
            dim, dim, depthwise, stride, depthwise // 2, groups=dim, **dd) if depthwise else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets small predictor weights (std .02), zero biases but for the supports', and the gate."""
        super().reset_parameters()
        for conv in (self.reduce, self.predict):
            nn.init.trunc_normal_(conv.weight, std=.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        if self.predict.bias is not None:
            self.set_initial_supports(self.predict.bias[self.groups:])
        if self.depthwise is not None:
            for parameter in self.depthwise.parameters():
                nn.init.zeros_(parameter)

    def set_initial_supports(self, raw: Tensor) -> None:
        """Fills `raw`, one value per group, with what the activation maps to `support_init` of the largest support."""
        with torch.no_grad():
            raw.copy_(torch.tensor([math.log(f / (1 - f)) for f in as_fractions(self.support_init, len(raw))]))

    def predict_maps(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight logits `(B, G, H, W)` and supports `(B, G, Ho, Wo)` in input pixels of the map `x`.

        Pixels where the boolean `(B, 1, H, W)` `present` is false count as outside the map.
        """
        hidden = self.act(self.reduce(x))
        if present is not None:
            hidden = hidden.masked_fill(~present, 0.)
        maps = self.predict(hidden)
        weight_logits = maps[:, :self.groups].type_as(self.predict.weight)
        raw = maps[:, self.groups:, ::self.stride, ::self.stride]
        sigma = torch.ops.cpool_vision.support_size(raw, x, self.ratio, self.floor)
        return weight_logits, sigma

    def mix(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """The pool of the map `x` alone, without base and gate: `(B, C, H, W)` to `(B, C, Ho, Wo)`.

        Pixels where the boolean `(B, 1, H, W)` `present` is false weigh nothing; they must be zero in `x`.
        """
        weight_logits, sigma = self.predict_maps(x, present)
        if present is not None:
            weight_logits = weight_logits.masked_fill(~present, -float('inf'))
        y = torch.ops.cpool_vision.context_pool2d(x, weight_logits, sigma, self.stride, self.backend)
        if self.depthwise is not None:
            y = y + self.depthwise(x).type_as(y)
        return y

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight logits `(B, G, H, W)` and supports `(B, G, Ho, Wo)` in input pixels for `x`. Stores nothing."""
        return self.predict_maps(x)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, groups={self.groups}, ratio={self.ratio}, floor={self.floor}, '
                f'support_init={self.support_init}')


def context_pools(model: nn.Module) -> dict[str, ContextPool2d]:
    """Name and module of every context pool in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ContextPool2d)}
