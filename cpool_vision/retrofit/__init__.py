"""Adds context pools to existing models."""
from ..layers import context_pools
from .add import add_context_pool, remove_context_pool
from .contextpool_retrofit import contextpool_retrofit
from .finetune import freeze_base, param_groups, pool_parameters, unfreeze_base
from .places import POSITIONS, NoPlaceError
from .save import save_model

__all__ = [
    'POSITIONS',
    'NoPlaceError',
    'add_context_pool',
    'context_pools',
    'contextpool_retrofit',
    'freeze_base',
    'param_groups',
    'pool_parameters',
    'remove_context_pool',
    'save_model',
    'unfreeze_base',
]
