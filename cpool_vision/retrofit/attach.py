"""Adds a context pool to a module without wrapping it, so that state-dict keys stay valid.

The pool becomes the child `cpool` of the module. Modules that run their children in turn, like `nn.Sequential`, need
nothing else. For others, the class is replaced by a subclass whose `forward` also calls the pool, so that `isinstance`,
deepcopy, pickle, `torch.compile` and `torch.export` see an ordinary module.
"""
from collections.abc import Callable
from typing import Any

from torch import nn

from .subclass import extend, extensions_of, register, retract

NAME = 'cpool'
_SIDES = {'output': 'pooled_output', 'input': 'pooled_input'}


def _on_entry(function: Callable[[Any], Any], value: Any, index: int) -> Any:
    """Applies `function` to a tensor, or to one entry of a tuple or list."""
    if isinstance(value, tuple):
        return (*value[:index], function(value[index]), *value[index + 1:])
    if isinstance(value, list):
        return [*value[:index], function(value[index]), *value[index + 1:]]
    return function(value)


class _PooledOutput:
    """Pools the output of the module."""

    cpool_index = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return _on_entry(self.cpool, output, self.cpool_index)  # type: ignore[attr-defined]


class _PooledInput:
    """Pools the input of the module."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.cpool(x), *args, **kwargs)  # type: ignore[misc, attr-defined]


register(_SIDES['output'], 'ContextPool', _PooledOutput)
register(_SIDES['input'], 'ContextPool', _PooledInput)


def attach(module: Any, pool: nn.Module, side: str, runs_alone: bool, index: int = 0) -> None:
    """Makes `pool` run on the output or the input of `module`.

    Args:
        module: Module to change; it keeps its identity, its parameters and their names.
        pool: Pool to add as its child `cpool`.
        side: `output` or `input`.
        runs_alone: Whether the module itself runs all its children in turn.
        index: Entry to pool if the module returns a tuple or list.
    """
    module.add_module(NAME, pool)
    if not runs_alone:
        extend(module, _SIDES[side])
        if index:
            module.cpool_index = index


def detach(module: nn.Module) -> None:
    """Removes the pool from `module`, if it has one."""
    if set(_SIDES.values()) & set(extensions_of(module)):
        retract(module, *_SIDES.values())
        module.__dict__.pop('cpool_index', None)
    module._modules.pop(NAME, None)
