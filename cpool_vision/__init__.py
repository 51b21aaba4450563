"""Adaptive context pooling for vision: the operator, its layers, and variants registered with timm.

Importing the package registers every variant. Without timm, the operator and the layers remain.
"""
from .layers import ContextPool2d, TokenContextPool
from .ops import context_pool2d
from .version import __version__

__all__ = ['ContextPool2d', 'TokenContextPool', '__version__', 'context_pool2d']

try:
    from . import models
    from .retrofit import add_context_pool
except ModuleNotFoundError as e:
    if e.name != 'timm':
        raise
else:
    __all__ += ['add_context_pool', 'list_models', 'models']


def list_models(filter: str = '*cpool*') -> list[str]:
    """Names of the registered variants that match `filter`, for `timm.create_model`."""
    import timm
    return timm.list_models(filter)
