"""The operators under `torch.autocast`: features in the autocast dtype, as for matrix products, maps in fp32."""
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICES = {'cpu': 'AutocastCPU', 'cuda': 'AutocastCUDA'}


def _cast(tensor: Tensor, dtype: torch.dtype, device_type: str) -> Tensor:
    """As torch's own casts: fp64 and tensors of other devices are left as they are."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
    return tensor.to(dtype) if eligible else tensor


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would run the products inside an operator in half precision."""
    @functools.wraps(function)
    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.amp.is_autocast_available(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)
    return wrapper


def register_autocast(lib: torch.library.Library, name: str, operator: Callable[..., Any]) -> None:
    """Registers a form of `operator` under autocast: its first tensor in the autocast dtype, further ones in fp32.

    Gradients come in the dtypes of the inputs, since casts are differentiable.
    """
    for device_type, key in DEVICES.items():
        lib.impl(name, _make_kernel(operator, device_type), key)


def _make_kernel(operator: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    def kernel(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        def as_map(arg: Any) -> Any:
            return _cast(arg, torch.float32, device_type) if isinstance(arg, Tensor) else arg

        x = _cast(x, torch.get_autocast_dtype(device_type), device_type)
        with torch.autocast(device_type, enabled=False):
            return operator(x, *map(as_map, args), **{key: as_map(arg) for key, arg in kwargs.items()})
    return kernel
