from .context_pool import ContextPool2d, Subsample2d
from .token_context_pool import TokenContextPool

__all__ = ['ContextPool2d', 'Subsample2d', 'TokenContextPool']
