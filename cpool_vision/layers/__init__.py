from .context_pool import ContextPool2d, Subsample2d
from .controls import MIXERS, ControlPool2d, NaFlexControlPool, TokenControlPool, make_pool
from .naflex_context_pool import NaFlexContextPool, TokenGrids, find_grids
from .token_context_pool import TokenContextPool

__all__ = [
    'MIXERS', 'ContextPool2d', 'ControlPool2d', 'NaFlexContextPool', 'NaFlexControlPool', 'Subsample2d',
    'TokenContextPool', 'TokenControlPool', 'TokenGrids', 'find_grids', 'make_pool']
