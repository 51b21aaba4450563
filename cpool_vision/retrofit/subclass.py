"""Adds behavior to one module by a subclass of its class: `isinstance`, names and state dict do not change.

Such subclasses cannot be imported by name, so a module is copied and pickled as its own class and the list of what was
added to it, in order.
"""
from typing import Any

from torch import nn

_MIXINS: dict[str, type] = {}
_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


class Extended:
    """Mixin of every such subclass.

    Attributes:
        extended_class: The module's own class.
        extensions: Kinds of what was added, in order.
    """

    extended_class: type
    extensions: tuple[str, ...]
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, '__getstate__') else self.__dict__
        return _restore, (self.extended_class, self.extensions), state


def register(kind: str, prefix: str, mixin: type) -> None:
    """Names a mixin; classes that it is added to are called `prefix` and their own name."""
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
    """Kinds of what was added to `module`."""
    return module.extensions if isinstance(module, Extended) else ()


def extend(module: nn.Module, kind: str) -> None:
    """Adds the mixin `kind` to `module`; nothing where it has it already."""
    kinds = extensions_of(module)
    if kind not in kinds:
        base = module.extended_class if isinstance(module, Extended) else type(module)
        module.__class__ = _subclass(base, (*kinds, kind))


def retract(module: nn.Module, *kinds: str) -> None:
    """Takes the mixins `kinds` off `module` again, whatever was added since."""
    if isinstance(module, Extended):
        module.__class__ = _subclass(
            module.extended_class, tuple(kind for kind in module.extensions if kind not in kinds))
