"""Creates the module in a pool's slot by its name: a context pool, or a control in its place."""
import inspect
from typing import Any

from .context_pool import ContextPool2d
from .controls import (
    ABLATIONS,
    LOCAL,
    AblatedPool2d,
    LocalMixer2d,
    NaFlexAblatedPool,
    NaFlexLocalMixer,
    TokenAblatedPool,
    TokenLocalMixer,
)
from .mixer import Mixer2d
from .naflex_context_pool import NaFlexContextPool
from .token_context_pool import TokenContextPool

MIXERS = ('context', *ABLATIONS, *LOCAL)

# By layout: the pool, the pool with a part that does not adapt, the mixer that is not a context pool.
_LAYOUTS: dict[str, tuple[type[ContextPool2d], type[AblatedPool2d], type[LocalMixer2d]]] = {
    'map': (ContextPool2d, AblatedPool2d, LocalMixer2d),
    'tokens': (TokenContextPool, TokenAblatedPool, TokenLocalMixer),
    'naflex': (NaFlexContextPool, NaFlexAblatedPool, NaFlexLocalMixer),
}
_POOL_ARGS = frozenset(inspect.signature(ContextPool2d).parameters) - set(inspect.signature(LocalMixer2d).parameters)


def create_mixer(dim: int, mixer: str = 'context', layout: str = 'map', **kwargs: Any) -> Mixer2d:
    """Creates the module for a pool's slot: a context pool, or a control in its place.

    Args:
        dim: Channels.
        mixer: One of `MIXERS`: `context`, or a mixer of `AblatedPool2d` or `LocalMixer2d`.
        layout: `map` for `(B, C, H, W)`; `tokens` for `(B, P + H * W, C)`; `naflex` for `(B, P + N, C)` of images on
            their own grids.
        **kwargs: Arguments of `ContextPool2d`, `TokenContextPool` or `NaFlexContextPool`. Mixers without a predictor
            ignore those of the predictor.

    Raises:
        ValueError: Unknown `mixer` or `layout`, or an argument is out of range.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f'layout must be one of {tuple(_LAYOUTS)}, got {layout!r}')
    if mixer not in MIXERS:
        raise ValueError(f'mixer must be one of {MIXERS}, got {mixer!r}')
    pool, ablated, local = _LAYOUTS[layout]
    if mixer == 'context':
        return pool(dim, **kwargs)
    if mixer in ABLATIONS:
        return ablated(dim, mixer=mixer, **kwargs)
    return local(dim, mixer=mixer, **{k: v for k, v in kwargs.items() if k not in _POOL_ARGS})
