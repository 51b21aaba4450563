"""The families; importing this package registers every variant with timm.

Every file whose name does not begin with an underscore is a family, and is imported.
"""
import importlib
import inspect
import pkgutil

__all__ = []

for _info in pkgutil.iter_modules(__path__):
    if not _info.name.startswith('_'):
        _module = importlib.import_module(f'{__name__}.{_info.name}')
        _classes = {name: getattr(_module, name) for name in _module.__all__ if inspect.isclass(getattr(_module, name))}
        globals().update(_classes)
        __all__ += _classes
