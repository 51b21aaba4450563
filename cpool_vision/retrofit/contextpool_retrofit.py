"""The architecture `contextpool_retrofit`, by which timm recreates a base model with context pools.

Its name does not match `*cpool*`, because it is not a variant: it needs the name of a base model.
"""
import dataclasses
import inspect
from typing import Any

from timm.models import create_model, is_model

from ..models._compat import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from .add import ARCHITECTURE, add_context_pool

POOL_KEYS = tuple(
    key for key in inspect.signature(add_context_pool).parameters if key not in ('model', 'img_size', 'in_chans'))

default_cfgs = generate_default_cfgs({
    f'{ARCHITECTURE}.untrained': dict(input_size=(3, 224, 224), license='apache-2.0'),
})


def _own_cfg(pretrained_cfg: Any) -> dict[str, Any] | None:
    """Returns the configuration of a saved folder; None if the model is created by the architecture's name."""
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = dataclasses.asdict(pretrained_cfg)
    return pretrained_cfg if isinstance(pretrained_cfg, dict) else None


@register_model
def contextpool_retrofit(
        pretrained: bool = False,
        base: str | None = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
) -> Any:
    """Creates a timm model and adds context pools to it.

    Args:
        pretrained: Load weights: of base and pools from a saved folder, otherwise of the base only.
        base: Registered name of the base model, possibly with a tag.
        pretrained_cfg: Configuration of a saved folder.
        pretrained_cfg_overlay: Entries that replace those of the configuration.
        **kwargs: Arguments of `add_context_pool` as `cpool_*`, and arguments of the base model.

    Raises:
        ValueError: `base` is missing or is not a timm model.
        TypeError: There is an unknown keyword `cpool_*`.
        NoPlaceError: The base has no place for the pools.
    """
    # loading a folder must not open another folder or the hub
    if not isinstance(base, str) or not base or ':' in base or base.partition('.')[0] == ARCHITECTURE:
        raise ValueError(f'{ARCHITECTURE} needs the registered name of a base model, got base={base!r}: pass base, '
                         "for example base='resnet18'")
    if not is_model(base.partition('.')[0]):
        raise ValueError(f'unknown base model {base!r}: timm.list_models() lists the names')
    pool_args = {key[len('cpool_'):]: kwargs.pop(key) for key in list(kwargs) if key.startswith('cpool_')}
    unknown = sorted(set(pool_args) - set(POOL_KEYS))
    if unknown:
        raise TypeError(f"unknown keyword 'cpool_{unknown[0]}' for {ARCHITECTURE}: choose from "
                        f"{', '.join(f'cpool_{key}' for key in POOL_KEYS)}")
    cfg = _own_cfg(pretrained_cfg)
    features_only = kwargs.pop('features_only', False)
    feature_args: dict[str, Any] = {key: kwargs.pop(key) for key in ('out_indices', 'feature_cls') if key in kwargs}
    cache_dir = kwargs.pop('cache_dir', None)
    source_args = kwargs.pop('pretrained_model_args', None)
    model: Any = create_model(
        base, pretrained=pretrained and cfg is None, cache_dir=cache_dir,
        pretrained_cfg_overlay=None if cfg else pretrained_cfg_overlay, **_base_args(cfg, kwargs))
    add_context_pool(model, **pool_args)
    args = model._model_args
    if cfg is None:
        cfg, load = dict(model.pretrained_cfg), False
        pretrained_cfg_overlay = None
    else:
        load = pretrained
    cls = 'getter' if hasattr(model, 'forward_intermediates') else 'hook'
    feature_cfg: dict[str, Any] = {'feature_cls': cls, **feature_args}
    if features_only:
        feature_cfg.setdefault('out_indices', tuple(range(len(model.feature_info))))
        kwargs['features_only'] = True
    known = {'num_classes', 'in_chans', 'features_only'}
    model = build_model_with_cfg(
        lambda **_: model,
        ARCHITECTURE,
        load,
        pretrained_cfg={key: value for key, value in cfg.items() if key in _CFG_KEYS},
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg=feature_cfg,
        cache_dir=cache_dir,
        pretrained_model_args=source_args,
        **{key: value for key, value in kwargs.items() if key in known},
    )
    model._model_args = args
    return model


_CFG_KEYS = {field.name for field in dataclasses.fields(PretrainedCfg)}


def _base_args(cfg: dict[str, Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the base, with classes, channels and size of the saved configuration as defaults."""
    args = dict(kwargs)
    if cfg is None:
        return args
    if cfg.get('num_classes') is not None:
        args.setdefault('num_classes', cfg['num_classes'])
    if cfg.get('input_size'):
        args.setdefault('in_chans', cfg['input_size'][0])
        if cfg.get('fixed_input_size'):
            args.setdefault('img_size', tuple(cfg['input_size'][1:]))
    return args
