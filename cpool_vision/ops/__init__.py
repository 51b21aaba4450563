"""The context pooling operator. Needs torch only."""
from .api import context_pool2d
from .backends import BACKENDS, available_backends
from .plan import TOLERANCE
from .reference import context_pool2d_reference

__all__ = ['BACKENDS', 'TOLERANCE', 'available_backends', 'context_pool2d', 'context_pool2d_reference']
