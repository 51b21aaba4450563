from .context_pool import ContextPool2d, Subsample2d
from .controls import MIXERS, ControlPool2d, TokenControlPool, make_pool
from .token_context_pool import TokenContextPool

__all__ = [
    'MIXERS', 'ContextPool2d', 'ControlPool2d', 'Subsample2d', 'TokenContextPool', 'TokenControlPool', 'make_pool']
