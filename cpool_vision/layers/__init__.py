from .context_pool import ContextPool2d, context_pools
from .controls import AblatedPool2d, LocalMixer2d
from .factory import MIXERS, create_mixer
from .mixer import Mixer2d, Subsample2d, mixers
from .naflex_context_pool import NaFlexContextPool, NaFlexMixer, TokenGrids, find_grids
from .token_context_pool import TokenContextPool

__all__ = [
    'MIXERS', 'AblatedPool2d', 'ContextPool2d', 'LocalMixer2d', 'Mixer2d', 'NaFlexContextPool', 'NaFlexMixer',
    'Subsample2d', 'TokenContextPool', 'TokenGrids', 'context_pools', 'create_mixer', 'find_grids', 'mixers']
