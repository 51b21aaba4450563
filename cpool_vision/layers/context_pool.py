"""Context pooling of feature maps: a small predictor of weights and supports, and the operator."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import BACKENDS
from .mixer import Mixer2d

OFFSETS = ('none', 'group', 'cell')


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


@torch.jit.unused
def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind`, without hooks: not a subclass, as parametrized modules are, nor wrapped."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and 'forward' not in module.__dict__


@torch.jit.unused
def is_plain_convolution(module: nn.Module, side: int) -> bool:
    """Whether `module` is a plain `nn.Conv2d` of stride 1 with kernels of so many pixels a side."""
    return isinstance(module, nn.Conv2d) and is_plain(module, nn.Conv2d) and (
        module.kernel_size, module.padding, module.stride, module.dilation, module.groups, module.padding_mode,
    ) == ((side, side), (side // 2, side // 2), (1, 1), (1, 1), 1, 'zeros')


class ContextPool2d(Mixer2d):
    """Replaces each pixel by a weighted mean of its neighborhood, with predicted weights and a predicted size.

    A predictor of two convolutions (1x1 from `dim` to `hidden_dim`, activation, 3x3 to `2 * groups`) gives a weight
    logit per input pixel and a raw support `s` per output cell; the support is a Gaussian of standard deviation
    `sigma = floor + ratio * sqrt(H * W) * sigmoid(s)` input pixels. Then
    `y_i = sum_j softmax_j(l_j - |p_i - p_j|^2 / (2 sigma_i^2)) x_j` (Huang et al., ICML 2022,
    https://arxiv.org/abs/2207.01844).

    A weight logit is `b * tanh(raw / b)` with `b = logit_bound`, so weights of a map differ by a factor of at most
    `exp(2 b)`. The state dict contains the bound (the buffer `logit_bound`). A state dict without it was trained with
    unbounded logits, and makes the layer that loads it unbounded.

    With `h = hidden_dim` and `G = groups` the layer has `dim * h + h + 18 * h * G + 2 * G` parameters (and `dim` more
    with a gate, `(k * k + 1) * dim` more with `depthwise=k`; with `support_groups=S` the factor `2 * G` becomes
    `G + S`); its predictor costs `H * W * (dim * h + 18 * h * G)`
    multiply-adds, the pool itself at most `dim * (H * W) * (Ho * Wo)`, and fewer if supports are small.

    The layer runs as one operator (predictor, pool and gate) without calling the modules `reduce`, `act` and `predict`.
    It calls them if one of them has hooks or a parametrization, or was replaced, for example by a wrapper with low-rank
    adapters. Global module hooks do not count. Set `fused` to False to always call them.

    Weight logits and supports are handed to the operator in fp32, or fp64 where the parameters have it; the output has
    the dtype of the input. Under autocast the features are pooled in the autocast dtype, with
    logits and supports in fp32; the output has the autocast dtype, or with a gate that of its base.

    Args:
        dim: Channels C of the input `(B, C, H, W)`.
        stride: Output cells are `stride` pixels apart; the output is `(B, C, ceil(H / stride), ceil(W / stride))`.
        groups: Groups of channels with their own weights and supports; divides `dim`.
        ratio: Largest support relative to the side of the map.
        floor: Smallest support, in pixels.
        init: `paper` outputs the pool itself. `identity` outputs `base(x) + gamma * (pool(x) - base(x))` with a gate
            per channel that starts at zero, so that a new layer returns exactly `base(x)`.
        gate: Adds the gate with `init='paper'` too, where it starts at one and may have any sign: from a mean over the
            neighborhood (`gamma = 1`) to unsharp masking (`gamma < 0`).
        support_groups: Supports per cell; each is shared by `groups / support_groups` consecutive groups, whose masks
            are then computed once. `groups` if None.
        support_init: Mean support of a new layer relative to the largest, between 0 and 1. At 0.5 the raw supports
            start at zero; a small value starts near the identity and leaves room to grow. A pair spreads the groups
            geometrically from the first value to the second, as ALiBi does with the slopes of its heads.
        depthwise: Side of a depthwise convolution whose output is added to the pool's: the pool computes means, the
            convolution can look to one side and subtract. It starts at zero; 0 for none.
        offset: Where a group looks relative to its cell, within `ratio` times the side of the map in each direction:
            `none` at the cell itself; `group` at an offset that each group learns, as in dilated convolutions with
            learnable spacings; `cell` at offsets predicted for every cell (`18 * h * G + 2 * G` more parameters).
            Offsets start at zero, those of `cell` near it.
        logit_bound: Bound b of the weight logits in nats; 0 leaves them unbounded.
        hidden_dim: Width of the predictor; `max(16, dim // 16)` rounded to a multiple of 8 if None.
        base: What `identity` starts from; the identity itself at stride 1 if None. Not kept with `init='paper'`.
        act_layer: Activation of the predictor.
        backend: Backend of the operator; None chooses one per call. A named backend never falls back silently.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An argument is out of range, or a gate with `stride > 1` has no `base`. On call, outside TorchScript
            and fx: the input is not `(B, C, H, W)` with `dim` channels.
        TypeError: `act_layer` does not return a module.
    """

    backend: str | None
    logit_bound: Tensor
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
            support_groups: int | None = None,
            offset: str = 'none',
            logit_bound: float = 8.0,
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
        hidden_dim = hidden_dim or default_hidden_dim(dim)
        support_groups = groups if support_groups is None else support_groups
        if support_groups < 1 or groups % support_groups:
            raise ValueError(f'support_groups must divide groups, got {support_groups=} for {groups=}: choose one of '
                             f'{[n for n in range(1, groups + 1) if groups % n == 0]}')
        if offset not in OFFSETS:
            raise ValueError(f'offset must be one of {OFFSETS}, got {offset!r}')
        if not 0 <= logit_bound < math.inf:
            raise ValueError(f'logit_bound must be >= 0 (nats; 0 for no bound), got {logit_bound}')
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f'backend must be one of {BACKENDS}, or None for the best that can run, got {backend!r}')
        self.groups = groups
        self.support_groups = support_groups
        self.ratio = float(ratio)
        self.floor = float(floor)
        self.bound = float(logit_bound)
        as_fractions(support_init, support_groups)
        self.support_init = float(support_init) if isinstance(support_init, (int, float)) else tuple(support_init)
        self.backend = backend

        self.reduce = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = act_layer()
        if not isinstance(self.act, nn.Module):
            raise TypeError(f'act_layer must make a module, such as nn.GELU, got {act_layer!r}')
        outputs = groups + support_groups + (2 * groups if offset == 'cell' else 0)
        self.predict = nn.Conv2d(hidden_dim, outputs, 3, padding=1, **dd)
        self.offset_per_cell = offset == 'cell'
        self.fused = self.scripts_fused = True
        self.offset = nn.Parameter(torch.empty(groups, 2, **dd)) if offset == 'group' else None
        self.register_buffer('logit_bound', torch.tensor(self.bound, device=device))
        self.depthwise = nn.Conv2d(
            dim, dim, depthwise, stride, depthwise // 2, groups=dim, **dd) if depthwise else None
        self.reset_parameters()

    def may_fuse(self) -> bool:
        """Whether one operator can replace the predictor's modules, see the class."""
        if torch.jit.is_scripting():
            return self.scripts_fused
        rows, act = self.groups + self.support_groups, self.act
        return (self.fused and self.mixer == 'context' and is_plain(act, nn.GELU) and act.approximate == 'none'
                and is_plain_convolution(self.reduce, 1) and is_plain_convolution(self.predict, 3)
                and self.predict.out_channels == rows)

    def __prepare_scriptable__(self) -> 'ContextPool2d':
        # Called by torch.jit.script, in whose language the modules could not be looked at.
        self.scripts_fused = self.may_fuse()
        return self

    def reset_parameters(self) -> None:
        """Sets small predictor weights (std .02), zero biases but for the supports', and the gate."""
        super().reset_parameters()
        for conv in (self.reduce, self.predict):
            nn.init.trunc_normal_(conv.weight, std=.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        if self.predict.bias is not None:
            self.set_initial_supports(self.predict.bias[self.groups:self.groups + self.support_groups])
        if self.offset is not None:
            nn.init.zeros_(self.offset)
        self.logit_bound.fill_(self.bound)
        if self.depthwise is not None:
            for parameter in self.depthwise.parameters():
                nn.init.zeros_(parameter)

    def set_initial_supports(self, raw: Tensor) -> None:
        """Fills `raw`, one value per support, with what the activation maps to `support_init` of the largest."""
        with torch.no_grad():
            raw.copy_(torch.tensor([math.log(f / (1 - f)) for f in as_fractions(self.support_init, len(raw))]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f'{prefix}predict.weight' in state_dict:
            self.bound = float(state_dict.setdefault(f'{prefix}logit_bound', torch.zeros(())))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def predict_maps(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight logits `(B, G, H, W)` and supports `(B, G, Ho, Wo)` in input pixels of the map `x`.

        Pixels where the boolean `(B, 1, H, W)` `present` is false count as outside the map.
        """
        if present is None and self.may_fuse():
            return self.predict_token_maps(x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3])
        return self.read_maps(self.raw_maps(x, present))

    def predict_token_maps(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """`predict_maps` of tokens `(B, P + height * width, C)` by the fused operator."""
        return torch.ops.cpool_vision.predict_maps(
            x, self.reduce.weight, self.reduce.bias, self.predict.weight, self.predict.bias, height, width,
            self.groups, self.support_groups, self.stride, self.bound, self.ratio, self.floor)

    def pool_as_one(
            self, x: Tensor, gamma: Tensor | None, base: Tensor | None, num_prefix_tokens: int, height: int,
            width: int) -> Tensor:
        """The pool of a map or of tokens by one operator, with the gate where given."""
        return torch.ops.cpool_vision.context_pool_layer(
            x, self.reduce.weight, self.reduce.bias, self.predict.weight, self.predict.bias, gamma, base,
            num_prefix_tokens, height, width, self.groups, self.support_groups, self.stride, self.bound, self.ratio,
            self.floor, self.backend)

    def raw_maps(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """The predictor's output `(B, K, H, W)`: rows of the weight logits, of the supports, of offsets per cell."""
        hidden = self.act(self.reduce(x))
        if present is not None:
            hidden = hidden.masked_fill(~present, 0.)
        return self.predict(hidden)

    def read_maps(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Weight logits and supports from the predictor's output `raw`."""
        return torch.ops.cpool_vision.supports_and_logits(
            raw, self.groups, self.support_groups, self.stride, self.bound, self.ratio, self.floor)

    def read_offset(self, raw: Tensor, height: int, width: int) -> Tensor | None:
        """Offsets in pixels of the map, rows before columns: `(B or 1, G, 2, Ho or 1, Wo or 1)`, or None."""
        reach = self.ratio * (height * width) ** .5
        if self.offset is not None:
            return reach * self.offset.tanh().view(1, -1, 2, 1, 1)
        if not self.offset_per_cell:
            return None
        cells = raw[:, self.groups + self.support_groups:, ::self.stride, ::self.stride]
        return reach * cells.type_as(self.predict.weight).tanh().unflatten(1, (self.groups, 2))

    def mix(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """The pool of the map `x` alone, without base and gate: `(B, C, H, W)` to `(B, C, Ho, Wo)`.

        Pixels where the boolean `(B, 1, H, W)` `present` is false weigh nothing; they must be zero in `x`.
        """
        x = torch.ops.cpool_vision.to_autocast(x)
        if present is None and self.offset is None and self.may_fuse():
            y = self.pool_as_one(x, None, None, 0, x.shape[2], x.shape[3])
        else:
            raw = self.raw_maps(x, present)
            weight_logits, sigma = self.read_maps(raw)
            if present is not None:
                weight_logits = weight_logits.masked_fill(~present, -float('inf'))
            y = torch.ops.cpool_vision.context_pool2d(
                x, weight_logits, sigma, self.stride, self.backend, self.read_offset(raw, x.shape[2], x.shape[3]))
        if self.depthwise is not None:
            y = y + self.depthwise(x).type_as(y)
        return y

    def mix_and_blend(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """As in `Mixer2d`; one operator includes the gate if possible."""
        if present is None and self.gamma is not None and self.offset is None and self.depthwise is None:
            if self.may_fuse():
                features = torch.ops.cpool_vision.to_autocast(x)
                return self.pool_as_one(features, self.gamma, self.base(x), 0, x.shape[2], x.shape[3])
        return self.blend(x, self.mix(x, present))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight logits `(B, G, H, W)` and supports `(B, G, Ho, Wo)` in input pixels for `x`. Stores nothing."""
        return self.predict_maps(x)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, groups={self.groups}, support_groups={self.support_groups}, '
                f'ratio={self.ratio}, floor={self.floor}, support_init={self.support_init}, logit_bound={self.bound:g}')


def context_pools(model: nn.Module) -> dict[str, ContextPool2d]:
    """Name and module of every context pool in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ContextPool2d)}
