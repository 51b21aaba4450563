"""Puts a context pool into an existing module without moving the module: its state-dict keys stay valid.

The pool becomes the child `cpool` of the module. Where the module runs its children by itself (`nn.Sequential` and
the like) that is all. Elsewhere the module's class becomes a subclass of its own whose `forward` calls the pool too, so
that `isinstance`, deepcopy, pickle, `torch.compile` and `torch.export` see an ordinary module.
"""
from typing import Any

from torch import nn

NAME = 'cpool'


def _on_entry(function: Any, value: Any, index: int) -> Any:
    """Applies `function` to a tensor, or to one entry of a tuple or list."""
    if isinstance(value, tuple):
        return (*value[:index], function(value[index]), *value[index + 1:])
    if isinstance(value, list):
        return [*value[:index], function(value[index]), *value[index + 1:]]
    return function(value)


def _restore(base: type, side: str) -> nn.Module:
    cls: Any = _pooled_class(base, side)
    return cls.__new__(cls)


class _Pooled:
    """What the subclasses share: how they are copied and pickled, as they have no name that could be imported."""

    cpool_base: type
    cpool_side: str
    cpool_index = 0
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, '__getstate__') else self.__dict__
        return _restore, (self.cpool_base, self.cpool_side), state


class _PooledOutput(_Pooled):
    """Pools what the module returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return _on_entry(self.cpool, output, self.cpool_index)  # type: ignore[attr-defined]


class _PooledInput(_Pooled):
    """Pools what the module reads."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.cpool(x), *args, **kwargs)  # type: ignore[misc, attr-defined]


_SIDES: dict[str, type] = {'output': _PooledOutput, 'input': _PooledInput}
_CLASSES: dict[tuple[type, str], type] = {}


def _pooled_class(base: type, side: str) -> type:
    if (base, side) not in _CLASSES:
        body = {'cpool_base': base, 'cpool_side': side, '__doc__': base.__doc__, '__module__': __name__}
        _CLASSES[base, side] = type(f'ContextPool{base.__name__}', (_SIDES[side], base), body)
    return _CLASSES[base, side]


def attach(module: Any, pool: nn.Module, side: str, native: bool, index: int = 0) -> None:
    """Makes `pool` run on the output or the input of `module`.

    Args:
        module: Keeps its identity, its parameters and their names.
        pool: Becomes its child `cpool`.
        side: `output` or `input`.
        native: The module runs its children in turn by itself.
        index: Entry of the tuple or list that the module returns.
    """
    module.add_module(NAME, pool)
    if not native:
        module.__class__ = _pooled_class(type(module), side)
        if index:
            module.cpool_index = index


def detach(module: nn.Module) -> None:
    """Takes the pool out of `module` again; nothing where it holds none."""
    if isinstance(module, _Pooled):
        module.__class__ = module.cpool_base
        module.__dict__.pop('cpool_index', None)
    module._modules.pop(NAME, None)
