"""Fine-tunes models with context pools: parameter groups for pools and base, and freezing the base."""
import fnmatch
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..layers import mixers
from .subclass import extend, extensions_of, register, retract

# Running statistics change in training even if all parameters are frozen.
_STATISTICS = ('running_mean', 'running_var')
_FIXED = 'fixed_statistics'


def pool_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of all context pools in `model` by name, without those of modules that they replaced."""
    own: dict[str, nn.Parameter] = {}
    for name, mixer in mixers(model):
        prefix = f'{name}.' if name else ''
        own.update({f'{prefix}{key}': p for key, p in mixer.named_parameters() if not key.startswith('base.')})
    return own


def param_groups(
        model: Any,
        pool_lr_scale: float = 1.0,
        lr: float | None = None,
        weight_decay: float = 0.0,
        pool_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Returns parameter groups for an optimizer: pools and base, each with and without weight decay.

    Vectors, biases and the names in the model's `no_weight_decay()` are not decayed. Frozen parameters are left out.
    With `lr`, every group has its own learning rate, which works with any scheduler. Without it, groups have
    `lr_scale`, which only timm's schedulers use. Can be timm's `param_group_fn`::

        create_optimizer_v2(model, 'adamw', lr=1e-3, param_group_fn=partial(param_groups, pool_lr_scale=10, lr=1e-3))

    Args:
        model: A model with context pools.
        pool_lr_scale: Learning rate of the pools as a multiple of the base's.
        lr: Learning rate of the base.
        weight_decay: Weight decay of the base.
        pool_weight_decay: Weight decay of the pools; that of the base if None.

    Raises:
        ValueError: `pool_lr_scale` is not positive, the model has no context pool, or no parameter is trainable.
    """
    if not pool_lr_scale > 0:
        raise ValueError(f'pool_lr_scale must be > 0, got {pool_lr_scale}: to freeze the pools, call '
                         'requires_grad_(False) on them')
    pools = pool_parameters(model)
    if not pools:
        raise ValueError(f'{type(model).__name__} has no context pool: call add_context_pool first')
    patterns = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    decays = {'base': weight_decay, 'pool': weight_decay if pool_weight_decay is None else pool_weight_decay}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith('.bias') or any(fnmatch.fnmatch(name, p) for p in patterns)
        groups.setdefault(('pool' if name in pools else 'base', not plain), []).append(parameter)
    if not groups:
        raise ValueError(f'no parameter of {type(model).__name__} requires a gradient: call unfreeze_base')
    result = []
    for (kind, decayed), parameters in sorted(groups.items()):
        scale = pool_lr_scale if kind == 'pool' else 1.0
        group: dict[str, Any] = {
            'params': parameters,
            'group_name': f"{kind}_{'decay' if decayed else 'no_decay'}",
            'weight_decay': decays[kind] if decayed else 0.0,
        }
        # only one of them: timm's schedulers would otherwise apply the factor twice
        group.update({'lr_scale': scale} if lr is None else {'lr': lr * scale})
        result.append(group)
    return result


class _FixedStatistics:
    """Keeps a normalization layer in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


register(_FIXED, 'Fixed', _FixedStatistics)


def _with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(module._buffers.get(name) is not None for name in _STATISTICS):
            yield module


def freeze_base(model: Any, train_head: bool = False) -> Any:
    """Freezes everything except the context pools, in place, including running statistics.

    Normalization layers with running statistics stay in eval mode, even after `model.train()`; their state-dict keys
    do not change. Dropout and stochastic depth follow `model.train()` as usual. Convert to synchronized batch norm
    before freezing, because that creates new modules.

    Args:
        model: A model with context pools.
        train_head: Also train the classifier (`model.get_classifier()`), for example for new classes.

    Returns:
        `model`.

    Raises:
        ValueError: The model has no context pool, or no classifier to train.
    """
    pools = {id(parameter) for parameter in pool_parameters(model).values()}
    if not pools:
        raise ValueError(f'{type(model).__name__} has no context pool: call add_context_pool first')
    heads: list[nn.Parameter] = []
    if train_head:
        head = model.get_classifier() if hasattr(model, 'get_classifier') else None
        for part in head if isinstance(head, (tuple, list)) else [head]:
            heads += part.parameters() if isinstance(part, nn.Module) else []
        if not heads:
            raise ValueError(f'{type(model).__name__} has no classifier with parameters: pass train_head=False, or '
                             'call reset_classifier first')
    trained = pools | {id(parameter) for parameter in heads}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for module in list(_with_statistics(model)):
        extend(module, _FIXED)
        module.train(False)
    return model


def unfreeze_base(model: Any) -> Any:
    """Undoes `freeze_base`, in place: all parameters are trained, and normalization layers follow the model's mode."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        if _FIXED in extensions_of(module):
            retract(module, _FIXED)
            module.train(model.training)
    return model
