"""Which implementations can take a call, and why not: one predicate each, used to choose and to explain."""
from collections.abc import Callable

import torch
from torch import Tensor

from .plan import TOLERANCE

Predicate = Callable[[Tensor, Tensor, Tensor, int], str | None]


def _can_run_tiled(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> str | None:
    if x.dtype not in TOLERANCE:
        return f'x.dtype={x.dtype} is not one of {", ".join(str(d) for d in TOLERANCE)}'
    if torch._C._functorch.maybe_current_level() is not None:
        return 'it cannot be transformed by torch.func'
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return 'it reads supports on the host, which a CUDA graph capture forbids'
    return None


def _can_run_reference(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> str | None:
    return None


# In order of preference.
_PREDICATES: dict[str, Predicate] = {
    'tiled': _can_run_tiled,
    'reference': _can_run_reference,
}
BACKENDS = tuple(_PREDICATES)


def available_backends(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1) -> dict[str, str | None]:
    """Says for every backend whether it can take these arguments.

    Returns:
        By backend, in order of preference: None if it can, else the reason why not.
    """
    return {name: predicate(x, weight_logits, sigma, stride) for name, predicate in _PREDICATES.items()}


def choose_backend(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, backend: str | None) -> str:
    """The first backend that can run, or the requested one.

    Raises:
        ValueError: `backend` is unknown.
        NotImplementedError: the requested backend cannot take these arguments. There is no silent fallback.
    """
    if backend is None:
        for name, predicate in _PREDICATES.items():
            if predicate(x, weight_logits, sigma, stride) is None:
                return name
    if backend not in _PREDICATES:
        raise ValueError(f'unknown {backend=}; choose one of {", ".join(BACKENDS)}, or None for the best that can run')
    reason = _PREDICATES[backend](x, weight_logits, sigma, stride)
    if reason is not None:
        raise NotImplementedError(f"backend='{backend}' cannot run: {reason}; pass backend=None to use another")
    return backend
