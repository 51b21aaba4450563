"""What a family declares in its file, and the `cpool_*` keywords that every variant takes."""
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..layers import MIXERS

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Family:
    """Where a family can pool, and its defaults.

    Args:
        name: Name of the family, that of timm's file.
        positions: Positions that `cpool_positions` may name; the first is the default.
        stages: Stages that pool by default; None for a family without stages.
        ratio, groups: Defaults of `cpool_ratio` and `cpool_groups`.
        former_positions: Former names of positions, which saved models may contain, and their present names.
    """
    name: str
    positions: tuple[str, ...]
    stages: tuple[int, ...] | None = None
    ratio: float = 0.1
    groups: int = 1
    former_positions: Mapping[str, str] = field(default_factory=dict)


def as_tuple(value: Any) -> tuple:
    """A sequence as it is, one string or number as a sequence of it."""
    return (value,) if isinstance(value, (str, int)) else tuple(value)


@dataclass(frozen=True)
class PoolConfig:
    """Where a model pools and how: the `cpool_*` keywords of every variant, without the prefix.

    Args:
        family: What the variant's family declares.
        positions: A position or a sequence of them; `'none'` or an empty sequence gives the plain base architecture.
        stages: Index or indices of the stages that pool (staged families only).
        ratio, groups: As in `ContextPool2d`; those of the family if None.
        floor, init, gate, support_init, support_groups, offset, depthwise, logit_bound, backend: As in `ContextPool2d`.
        mixer: The module in place of the pools, for comparisons; one of `cpool_vision.layers.MIXERS`.

    Raises:
        ValueError: An unknown position or mixer, or a stage out of range.
    """
    family: Family
    positions: Any = None
    stages: Any = None
    ratio: float | None = None
    floor: float = 0.1
    groups: int | None = None
    init: str = 'paper'
    gate: bool = False
    support_init: Any = 0.5
    support_groups: int | None = None
    offset: str = 'none'
    depthwise: int = 0
    logit_bound: float = 8.0
    backend: str | None = None
    mixer: str = 'context'

    def __post_init__(self) -> None:
        known = self.family.positions
        positions = known[:1] if self.positions is None else as_tuple(self.positions)
        positions = tuple(self.family.former_positions.get(position, position) for position in positions)
        if positions == ('none',):
            positions = ()
        for position in positions:
            if position not in known:
                raise ValueError(
                    f"unknown position {position!r} for {self.family.name}: choose from {', '.join(known)}, or 'none'")
        if self.mixer not in MIXERS:
            raise ValueError(f"cpool_mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}")
        stages = (self.family.stages or STAGES) if self.stages is None else as_tuple(self.stages)
        for stage in stages:
            if stage not in STAGES:
                raise ValueError(f'cpool_stages must be among {STAGES}, got {stage!r}')
        object.__setattr__(self, 'positions', positions)
        object.__setattr__(self, 'stages', stages)
        for name in ('ratio', 'groups'):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.family, name))

    @property
    def layer_args(self) -> dict[str, Any]:
        """Keyword arguments for the layer."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ('family', 'positions', 'stages')}

    def model_args(self) -> dict[str, Any]:
        """The `cpool_*` keywords that rebuild this configuration, JSON-able."""
        args = {f'cpool_{k}': v for k, v in self.layer_args.items() if v is not None}
        args['cpool_positions'] = list(self.positions) or 'none'
        if self.family.stages is not None:
            args['cpool_stages'] = list(self.stages)
        return args
