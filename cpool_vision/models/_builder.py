"""What the families share: building a variant, pretrained configurations and weight loading."""
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import context_pools, mixers
from ._compat import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
)
from ._family import Family, PoolConfig

PRETRAINED_INIT = 'identity'

_PREDICTOR_KEYS = ('.reduce.weight', '.reduce.bias', '.predict.weight', '.predict.bias')


def init_mixers(model: nn.Module) -> None:
    """Initializes every mixer of `model`, whose layers the model's own initialization may have overwritten."""
    for _, mixer in mixers(model):
        mixer.reset_parameters()


def pool_keys(model: nn.Module) -> set[str]:
    """State-dict keys that the variant adds to its base architecture."""
    return {
        f'{name}.{key}'
        for name, mixer in mixers(model)
        for key in mixer.state_dict() if key.partition('.')[0] != 'base'
    }


def _filter_weights(state_dict: dict[str, Any], model: nn.Module, base_filter: Callable | None) -> dict[str, Tensor]:
    """Adds the variant's new pools to base weights, so that loading can be strict.

    Raises:
        ValueError: The checkpoint has context pools, but not those of `model`.
    """
    if base_filter is not None:
        state_dict = base_filter(state_dict, model)
    # weights from before there was a bound are those of unbounded logits
    former = {f'{name}.logit_bound' for name in context_pools(model) if f'{name}.predict.weight' in state_dict}
    state_dict = {**{key: torch.zeros(()) for key in former}, **state_dict}
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
    """`default_cfgs` of a family: `bases` maps variants to timm's architectures, `own` holds more cfgs by name."""
    cfgs: dict[str, Any] = dict(own)
    for variant, base in bases.items():
        cfgs.update(base_cfgs(variant, base))
    return generate_default_cfgs(cfgs)


def build_variant(
        model_cls: Callable[..., nn.Module],
        family: Family,
        variant: str,
        pretrained: bool,
        base_filter: Callable | None = None,
        **kwargs: Any,
) -> Any:
    """Builds a variant through timm's builder.

    `cpool_*` keywords become a `PoolConfig`. With `pretrained` the weights of the base architecture are loaded, and
    `cpool_init` is `identity` unless given, so the variant gives the predictions of its base. The resolved keywords
    are recorded for saving, so that a saved model can be rebuilt when defaults change.
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


def check_placed(model: nn.Module, cpool: PoolConfig) -> None:
    """Raises ValueError if positions were requested but the model has none of them."""
    if cpool.positions and not any(mixers(model)):
        raise ValueError(
            f'positions {cpool.positions} in stages {cpool.stages} place no context pool in this model: '
            f"name other positions or stages, or cpool_positions='none' for the plain base")
