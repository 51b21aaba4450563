from . import registry as _registry  # registers torch.ops.cpool_vision
from .reference import context_pool2d_reference

__all__ = ['context_pool2d_reference']
