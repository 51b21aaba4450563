"""Which backends can run a call, and why the others cannot: one predicate each, used to choose and to explain."""
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import native
from .checks import check_arguments, why_not_differentiable
from .plan import TOLERANCE

Predicate = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], str | None]
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


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


def runs_triton(x: Tensor) -> bool:
    """Whether kernels for tensors like `x` are Triton's: by device and dtype, whatever the operator."""
    return x.is_cuda and x.dtype in HALF_AND_SINGLE and _has_triton()


def _why_not_dtype(x: Tensor, dtypes: Iterable[torch.dtype]) -> str | None:
    return None if x.dtype in dtypes else f'x.dtype={x.dtype} is not one of {", ".join(map(str, dtypes))}'


def _why_not_kernel(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, offset: Tensor | None) -> str | None:
    """What the kernels in C and those of Triton both refuse."""
    reason = _why_not_dtype(x, HALF_AND_SINGLE) or why_not_differentiable(x, weight_logits, sigma, offset)
    return reason or (None if offset is None else 'it takes no offset')


def _can_run_triton(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None) -> str | None:
    reason = _why_not_kernel(x, weight_logits, sigma, offset)
    if reason is not None:
        return reason
    if not _has_triton():
        return 'triton is not installed'
    if not x.is_cuda:
        if os.environ.get('TRITON_INTERPRET') != '1':
            return f'x is on {x.device} and not on a CUDA device (to debug on a CPU, start with TRITON_INTERPRET=1)'
        if not _interprets():
            return 'triton was imported before TRITON_INTERPRET=1 was set'
    return None


def _can_run_native(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None) -> str | None:
    reason = _why_not_kernel(x, weight_logits, sigma, offset)
    if reason is None and x.device.type != 'cpu':
        reason = f'x is on {x.device} and not on the CPU'
    return reason or native.why_not()


def _can_run_tiled(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None) -> str | None:
    reason = _why_not_dtype(x, TOLERANCE) or why_not_differentiable(x, weight_logits, sigma, offset)
    if reason is not None:
        return reason
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return 'it reads supports on the host, which a CUDA graph capture forbids'
    return None


def _can_run_reference(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None) -> str | None:
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
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1, offset: Tensor | None = None,
) -> dict[str, str | None]:
    """Reports for each backend whether it can run with these arguments of `context_pool2d`.

    This compiles nothing, so a failing C compiler is only known after the first call that needs it.

    Returns:
        By backend, in order of preference: None if it can run, else the reason why not.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: wrong rank or shape, groups that do not divide, `stride < 1`, or tensors on several devices.
    """
    check_arguments(x, weight_logits, sigma, stride, offset)
    return {name: predicate(x, weight_logits, sigma, stride, offset) for name, predicate in _PREDICATES.items()}


def choose_backend(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None, backend: str | None,
) -> str:
    """The first backend that can run arguments that `check_arguments` has passed, or the requested one.

    Raises:
        ValueError: `backend` is unknown.
        NotImplementedError: the requested backend cannot take these arguments. There is no silent fallback.
    """
    if backend is None:
        # Importing torch.onnx takes a while, and only code that has imported it exports.
        onnx = sys.modules.get('torch.onnx')
        if onnx is not None and onnx.is_in_onnx_export():
            return 'reference'  # made of operators that ONNX knows
        for name, predicate in _PREDICATES.items():
            # The interpreter of Triton's kernels is for tests, far slower than any other backend.
            if not (name == 'triton' and not x.is_cuda) and predicate(x, weight_logits, sigma, stride, offset) is None:
                if name != 'native' or native.prepare() is None:
                    return name
    if backend not in _PREDICATES:
        raise ValueError(f'unknown {backend=}; choose one of {", ".join(BACKENDS)}, or None for the best that can run')
    reason = _PREDICATES[backend](x, weight_logits, sigma, stride, offset)
    if reason is None and backend == 'native':
        reason = native.prepare()
    if reason is not None:
        raise NotImplementedError(f"backend='{backend}' cannot run: {reason}; pass backend=None to use another")
    return backend
