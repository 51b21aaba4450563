"""What the families share: the `cpool_*` keywords, their defaults, pretrained configurations and weight loading."""
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..layers import MIXERS, ContextPool2d
from ._compat import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
)

# Positions of each family, its default first.
POSITIONS = {
    'vision_transformer': ('pre_attn', 'post_block'),
    'resnet': ('stage', 'stem', 'stride', 'shortcut'),
    'convnext': ('stage', 'downsample'),
    'swin_transformer': ('pre_attn', 'window', 'post_block'),
    'metaformer': ('mixer',),
    'naflexvit': ('pre_attn', 'post_block'),
}
DEFAULT_POSITIONS = {family: positions[:1] for family, positions in POSITIONS.items()}
STAGES = (0, 1, 2, 3)
# At 224 pixels the first stage holds 56 x 56 maps, where a pool can cost more than the rest of its stage. The second
# stage of a ResNet is left out as well: with 512 channels at 28 x 28 it would carry most of the multiply-adds.
DEFAULT_STAGES = {
    'vision_transformer': STAGES,
    'resnet': (2, 3),
    'convnext': (1, 2, 3),
    'swin_transformer': (2, 3),
    'metaformer': STAGES,
    'naflexvit': STAGES,
}
STAGELESS = ('vision_transformer', 'naflexvit')
DEFAULT_RATIO = {  # that of ViT is the one at which docs/evidence.md measures its position and its groups
    'vision_transformer': 0.25,
    'resnet': 0.1,
    'convnext': 0.1,
    'swin_transformer': 0.1,
    'metaformer': 0.1,
    'naflexvit': 0.25,
}
DEFAULT_GROUPS = {
    'vision_transformer': 16,
    'resnet': 1,
    'convnext': 16,
    'swin_transformer': 1,
    'metaformer': 1,
    'naflexvit': 16,
}
DEFAULT_FLOOR = 0.1
DEFAULT_INIT = 'paper'
DEFAULT_SUPPORT_INIT = 0.5
DEFAULT_MIXER = 'context'
PRETRAINED_INIT = 'identity'

_PREDICTOR_KEYS = ('.reduce.weight', '.reduce.bias', '.predict.weight', '.predict.bias')


def as_tuple(value: Any) -> tuple:
    """A sequence as it is, one string or number as a sequence of it."""
    return (value,) if isinstance(value, (str, int)) else tuple(value)


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Where a model pools and how: the `cpool_*` keywords of every variant, without the prefix.

    Args:
        family: Key of `POSITIONS`.
        positions: A position or a sequence of them; `'none'` or an empty sequence gives the plain base architecture.
        stages: Index or indices of the stages that pool (staged families only).
        ratio, groups: As in `ContextPool2d`; those of the family if None.
        floor, init, support_init, backend: As in `ContextPool2d`.
        mixer: What stands in the pools' places, for comparisons; one of `cpool_vision.layers.MIXERS`.

    Raises:
        ValueError: An unknown position or mixer, or a stage out of range.
    """
    family: str
    positions: Any = None
    stages: Any = None
    ratio: float | None = None
    floor: float = DEFAULT_FLOOR
    groups: int | None = None
    init: str = DEFAULT_INIT
    support_init: float = DEFAULT_SUPPORT_INIT
    backend: str | None = None
    mixer: str = DEFAULT_MIXER

    def __post_init__(self) -> None:
        known = POSITIONS[self.family]
        positions = DEFAULT_POSITIONS[self.family] if self.positions is None else as_tuple(self.positions)
        if positions == ('none',):
            positions = ()
        for position in positions:
            if position not in known:
                raise ValueError(
                    f"unknown position {position!r} for {self.family}: choose from {', '.join(known)}, or 'none'")
        if self.mixer not in MIXERS:
            raise ValueError(f"cpool_mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}")
        stages = DEFAULT_STAGES[self.family] if self.stages is None else as_tuple(self.stages)
        for stage in stages:
            if stage not in STAGES:
                raise ValueError(f'cpool_stages must be among {STAGES}, got {stage!r}')
        object.__setattr__(self, 'positions', positions)
        object.__setattr__(self, 'stages', stages)
        for name, default in (('ratio', DEFAULT_RATIO), ('groups', DEFAULT_GROUPS)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default[self.family])

    @property
    def layer_args(self) -> dict[str, Any]:
        """Keyword arguments for the layer."""
        return {k: getattr(self, k) for k in ('ratio', 'floor', 'groups', 'init', 'support_init', 'backend', 'mixer')}

    def model_args(self) -> dict[str, Any]:
        """The `cpool_*` keywords that rebuild this configuration, JSON-able."""
        args = {f'cpool_{k}': v for k, v in self.layer_args.items() if v is not None}
        args['cpool_positions'] = list(self.positions) or 'none'
        if self.family not in STAGELESS:
            args['cpool_stages'] = list(self.stages)
        return args


def context_pools(model: nn.Module) -> Iterator[tuple[str, ContextPool2d]]:
    """Names and modules of every context pool in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, ContextPool2d):
            yield name, module


def init_context_pools(model: nn.Module) -> None:
    """Initialises every context pool of `model` anew, where the model's own scheme has passed over its layers."""
    for _, pool in context_pools(model):
        pool.reset_parameters()


def pool_keys(model: nn.Module) -> set[str]:
    """State-dict keys that the variant adds to its base architecture."""
    return {
        f'{name}.{key}'
        for name, pool in context_pools(model)
        for key in pool.state_dict() if key.partition('.')[0] != 'base'
    }


def _filter_weights(state_dict: dict[str, Any], model: nn.Module, base_filter: Callable | None) -> dict[str, Tensor]:
    """Makes base weights complete with the variant's fresh pools, so that loading can stay strict.

    Raises:
        ValueError: The checkpoint holds context pools, but not those of `model`.
    """
    if base_filter is not None:
        state_dict = base_filter(state_dict, model)
    expected = pool_keys(model)
    present = {k for k in state_dict if k in expected or k.endswith(_PREDICTOR_KEYS)}
    if present and present != expected:
        odd = sorted(present ^ expected)[0]
        raise ValueError(
            f'the checkpoint holds other context pools than the model ({len(present)} and {len(expected)} keys, '
            f'{odd!r} in one of them only): pass the cpool_init, cpool_positions and cpool_stages it was trained with')
    if not present:
        own = model.state_dict()
        state_dict = {**state_dict, **{k: own[k] for k in expected}}
    return state_dict


def base_cfgs(variant: str, base: str) -> dict[str, PretrainedCfg]:
    """timm's pretrained configurations of the architecture `base`, for `variant`, in timm's order."""
    cfgs = {}
    for i, (name, cfg) in enumerate(get_arch_pretrained_cfgs(base).items()):
        tag = name.partition('.')[2] + ('*' if i == 0 else '')
        cfgs[f'{variant}.{tag}'] = dataclasses.replace(cfg, architecture=None, tag=None)
    return cfgs


def variant_cfgs(bases: dict[str, str], own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`default_cfgs` of a family: `bases` maps variants to timm's architectures, `own` holds further cfgs by name."""
    cfgs: dict[str, Any] = dict(own)
    for variant, base in bases.items():
        cfgs.update(base_cfgs(variant, base))
    return generate_default_cfgs(cfgs)


def build_variant(
        model_cls: Callable[..., nn.Module],
        family: str,
        variant: str,
        pretrained: bool,
        base_filter: Callable | None = None,
        **kwargs: Any,
) -> Any:
    """Builds a variant through timm's builder.

    `cpool_*` keywords become a `PoolConfig`. With `pretrained` the base architecture's weights are loaded, and
    `cpool_init` is `identity` unless given, so that the variant predicts what its base predicts. The resolved keywords
    are recorded for saving: a checkpoint stays rebuildable when defaults change.
    """
    keys = [f.name for f in dataclasses.fields(PoolConfig) if f'cpool_{f.name}' in kwargs]
    pool_args = {k: kwargs.pop(f'cpool_{k}') for k in keys}
    unknown = [k for k in kwargs if k.startswith('cpool_')]
    if unknown:
        known = [f'cpool_{f.name}' for f in dataclasses.fields(PoolConfig)[1:]]
        raise TypeError(f"unknown keyword {unknown[0]!r} for {variant}: choose from {', '.join(known)}")
    if pretrained:
        pool_args.setdefault('init', PRETRAINED_INIT)
    cpool = PoolConfig(family, **pool_args)
    model: Any = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state_dict, model: _filter_weights(state_dict, model, base_filter),
        cpool=cpool,
        **kwargs,
    )
    model._model_args = dict(getattr(model, '_model_args', {}), **cpool.model_args())
    return model


def check_placed(pools: Iterable[Any], cpool: PoolConfig) -> None:
    """Raises ValueError where positions were asked for and none was found in the model."""
    if cpool.positions and not list(pools):
        raise ValueError(
            f'positions {cpool.positions} in stages {cpool.stages} place no context pool in this model: '
            f"name other positions or stages, or cpool_positions='none' for the plain base")
