"""Context pools in models that were made without them."""
from .add import add_context_pool, context_pools, remove_context_pool, set_image_size
from .places import POSITIONS, NoPlaceError

__all__ = [
    'POSITIONS',
    'NoPlaceError',
    'add_context_pool',
    'context_pools',
    'remove_context_pool',
    'set_image_size',
]
