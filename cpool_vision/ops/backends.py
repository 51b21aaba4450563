"""Which implementations can take a call, and why not: one predicate each, used to choose and to explain."""
import functools
import importlib.util
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import native
from .plan import TOLERANCE

Predicate = Callable[[Tensor, Tensor, Tensor, int], str | None]


@functools.cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec('triton') is not None
    except ImportError:
        return False


@functools.cache
def _interprets() -> bool:
    # Triton reads the variable when its functions are defined: setting it later is too late.
    from triton.language import standard
    return not hasattr(standard.sum, 'cache_key')


def _can_run_triton(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> str | None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'x.dtype={x.dtype} is not one of torch.float32, torch.float16, torch.bfloat16'
    if torch._C._functorch.maybe_current_level() is not None:
        return 'it cannot be transformed by torch.func'
    if not _has_triton():
        return 'triton is not installed'
    if not x.is_cuda:
        if os.environ.get('TRITON_INTERPRET') != '1':
            return f'x is on {x.device} and not on a CUDA device (to debug on a CPU, start with TRITON_INTERPRET=1)'
        if not _interprets():
            return 'triton was imported before TRITON_INTERPRET=1 was set'
    return None


def _can_run_native(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> str | None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'x.dtype={x.dtype} is not one of torch.float32, torch.float16, torch.bfloat16'
    if torch._C._functorch.maybe_current_level() is not None:
        return 'it cannot be transformed by torch.func'
    if x.device.type != 'cpu':
        return f'x is on {x.device} and not on the CPU'
    return native.why_not()


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
    'triton': _can_run_triton,
    'native': _can_run_native,
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
        # Importing torch.onnx takes a while, and only who has imported it exports.
        onnx = sys.modules.get('torch.onnx')
        if onnx is not None and onnx.is_in_onnx_export():
            return 'reference'  # made of operators that ONNX knows
        for name, predicate in _PREDICATES.items():
            # The interpreter of Triton's kernels is for tests, far slower than any other backend.
            if not (name == 'triton' and not x.is_cuda) and predicate(x, weight_logits, sigma, stride) is None:
                return name
    if backend not in _PREDICATES:
        raise ValueError(f'unknown {backend=}; choose one of {", ".join(BACKENDS)}, or None for the best that can run')
    reason = _PREDICATES[backend](x, weight_logits, sigma, stride)
    if reason is not None:
        raise NotImplementedError(f"backend='{backend}' cannot run: {reason}; pass backend=None to use another")
    return backend
