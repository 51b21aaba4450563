"""Adds behavior to a single module by giving it a subclass of its class; `isinstance` and its state dict still work.

These subclasses cannot be imported by name. A module is therefore copied and pickled as its original class and the list
of its extensions, in order.
"""
from typing import Any

from torch import nn

_MIXINS: dict[str, type] = {}
_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


class Extended:
    """Mixin of all these subclasses.

    Attributes:
        extended_class: The module's original class.
        extensions: Kinds of its extensions, in order.
    """

    extended_class: type
    extensions: tuple[str, ...]
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, '__getstate__') else self.__dict__
        return _restore, (self.extended_class, self.extensions), state


def register(kind: str, prefix: str, mixin: type) -> None:
    """Registers a mixin as `kind`; subclasses with it are named `prefix` plus the name of the original class."""
    _MIXINS[kind] = type(f'{prefix}Mixin', (mixin, Extended), {'prefix': prefix})


def _subclass(base: type, kinds: tuple[str, ...]) -> type:
    if not kinds:
        return base
    if (base, kinds) not in _CLASSES:
        mixin: Any = _MIXINS[kinds[-1]]
        parent = _subclass(base, kinds[:-1])
        body = {'extended_class': base, 'extensions': kinds, '__doc__': base.__doc__, '__module__': __name__}
        _CLASSES[base, kinds] = type(f'{mixin.prefix}{parent.__name__}', (mixin, parent), body)
    return _CLASSES[base, kinds]


def _restore(base: type, kinds: tuple[str, ...]) -> nn.Module:
    cls: Any = _subclass(base, kinds)
    return cls.__new__(cls)


def extensions_of(module: nn.Module) -> tuple[str, ...]:
    """Returns the kinds of a module's extensions."""
    return module.extensions if isinstance(module, Extended) else ()


def extend(module: nn.Module, kind: str) -> None:
    """Adds the mixin `kind` to `module`, unless it already has it."""
    kinds = extensions_of(module)
    if kind not in kinds:
        base = module.extended_class if isinstance(module, Extended) else type(module)
        module.__class__ = _subclass(base, (*kinds, kind))


def retract(module: nn.Module, *kinds: str) -> None:
    """Removes the mixins `kinds` from `module` and keeps others."""
    if isinstance(module, Extended):
        module.__class__ = _subclass(
            module.extended_class, tuple(kind for kind in module.extensions if kind not in kinds))
