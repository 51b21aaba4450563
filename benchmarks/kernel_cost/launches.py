"""Compiles every kernel that a call of the operator would launch, for any architecture, without a device."""
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cpool_vision.ops.triton import launch


@dataclasses.dataclass
class Launch:
    """A kernel as one call compiles it: programs, arguments by name, and the compiled kernel."""
    name: str
    grid: int
    args: dict[str, Any]
    compiled: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the operator; supports are uniform up to `sigma` pixels."""
    b: int
    c: int
    h: int
    w: int
    groups: int
    sigma: float
    dtype: torch.dtype = torch.bfloat16
    tokens: bool = True
    stride: int = 1


class _NoDevice:
    """Stands in for Triton's driver."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: each architecture is one of its own.
        return self.arch

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.arch, 32)


@contextmanager
def compile_only(arch: int, launches: list[Launch]) -> Iterator[None]:
    """Kernels are compiled for `arch` and noted in `launches` instead of started."""
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.__name__, math.prod(grid), named, compiled))
        return compiled

    JITFunction.run = compile_only
    driver.set_active(_NoDevice(arch))
    try:
        yield
    finally:
        driver._active = active
        JITFunction.run = run


def _maps(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and the incoming gradient, without storage."""
    ho, wo = -(-call.h // call.stride), -(-call.w // call.stride)

    def features(h: int, w: int) -> Tensor:
        if call.tokens:
            tokens = torch.empty(call.b, h * w, call.c, dtype=call.dtype, device='meta')
            return tokens.transpose(1, 2).unflatten(2, (h, w))
        return torch.empty(call.b, call.c, h, w, dtype=call.dtype, device='meta')

    logits, sigma = (torch.empty(call.b, call.groups, *size, device='meta') for size in ((call.h, call.w), (ho, wo)))
    return features(call.h, call.w), logits, sigma, features(ho, wo)


def compile_call(call: Call, arch: int = 90) -> list[Launch]:
    """The kernels of a forward and a backward pass, in the order of their launches."""
    launches: list[Launch] = []
    x, logits, sigma, grad = _maps(call)
    launch.forget_launches()
    with compile_only(arch, launches):
        _, kept = launch.triton_forward(x, logits, sigma, call.stride)
        launch.triton_backward(grad, x, logits, sigma, kept, call.stride)
    return launches
