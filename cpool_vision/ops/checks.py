"""What every implementation asks of its arguments, checked in each one's entry and in its fake.

Shapes, dtypes and devices only: nothing is read on the host, so these work on fakes and do not stall a GPU.
"""
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_arguments(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, offset: Tensor | None = None) -> None:
    """Raises unless the arguments fit together, see `context_pool2d`.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: wrong rank or shape, groups that do not divide, `stride < 1`, or tensors on several devices.
    """
    named = {'x': x, 'weight_logits': weight_logits, 'sigma': sigma}
    if offset is not None:
        named['offset'] = offset
    device = x.device
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f'{name} must be floating point, got {tensor.dtype}; convert it, e.g. {name}.float()')
        if tensor.device != device:
            raise ValueError(f'{name} is on {tensor.device} but x on {device}; move them to one device')
    for name in ('x', 'weight_logits', 'sigma'):
        _check_rank(name, named[name])
    if stride < 1:
        raise ValueError(f'stride must be >= 1, got {stride=}')
    b, c, h, w = x.shape
    groups, shared = weight_logits.shape[1], sigma.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(
            f'the {groups} groups of weight_logits must divide the {c} channels of x; '
            f'choose a number of groups that does')
    if shared < 1 or groups % shared:
        raise ValueError(
            f'the {shared} groups of sigma must divide the {groups} groups of weight_logits; '
            f'give one support for each group, or for every {groups} / k of them')
    if not h or not w:
        raise ValueError(f'x must have pixels, got shape {tuple(x.shape)}')
    ho, wo = (h + stride - 1) // stride, (w + stride - 1) // stride
    for name, tensor, expected in (
            ('weight_logits', weight_logits, (b, groups, h, w)), ('sigma', sigma, (b, shared, ho, wo))):
        if tensor.shape != expected:
            raise ValueError(
                f'{name} must have shape {expected} for x of shape {tuple(x.shape)} with {expected[1]} groups and '
                f'{stride=}, got {tuple(tensor.shape)}')
    if offset is not None:
        _check_offset(offset, b, groups, ho, wo)


def _check_rank(name: str, tensor: Tensor) -> None:
    if tensor.ndim == 4:
        return
    channels = 'C' if name == 'x' else 'G'
    remedy = {3: f'; add the batch axis, e.g. {name}[None]', 5: '; fold further batch axes into the first'}
    raise ValueError(
        f'{name} must have 4 dimensions (B, {channels}, H, W), got shape {tuple(tensor.shape)}'
        f'{remedy.get(tensor.ndim, "")}')


def _check_offset(offset: Tensor, b: int, groups: int, ho: int, wo: int) -> None:
    shape = offset.shape
    fits = (len(shape) == 5 and shape[0] in (1, b) and shape[1] == groups and shape[2] == 2
            and shape[3] in (1, ho) and shape[4] in (1, wo))
    if not fits:
        raise ValueError(
            f'offset must have shape (B or 1, G, 2, Ho or 1, Wo or 1) with B={b}, G={groups}, Ho={ho}, Wo={wo}, '
            f'got {tuple(shape)}')


def check_gradient(grad: Tensor, x: Tensor, sigma: Tensor) -> None:
    """Raises unless `grad` is a gradient of the pooled maps of arguments that `check_arguments` has passed.

    Raises:
        TypeError: it is not floating point.
        ValueError: wrong shape or device.
    """
    expected = (*x.shape[:2], *sigma.shape[2:])
    if not grad.is_floating_point():
        raise TypeError(f'grad must be floating point, got {grad.dtype}')
    if grad.device != x.device:
        raise ValueError(f'grad is on {grad.device} but x on {x.device}; move them to one device')
    if grad.shape != expected:
        raise ValueError(f'grad must have shape {expected}, that of the output, got {tuple(grad.shape)}')


def check_aside(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    """Raises unless `tensor`, kept by a forward pass for its backward pass, is what that made.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f'{name} must be what the forward pass returned, {dtype} of shape {shape} on {x.device}, '
            f'got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}')


def check_out(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raises unless `tensor` can be filled with maps of `shape`.

    Raises:
        TypeError: it is not floating point.
        ValueError: wrong shape or device, or elements that share memory.
    """
    if not tensor.is_floating_point():
        raise TypeError(f'{name} must be floating point, got {tensor.dtype}')
    if tensor.shape != shape or tensor.device != x.device:
        raise ValueError(
            f'{name} must have shape {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}')
    if any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f'{name} must have its own memory for every element, got strides {tensor.stride()}')


def _has_tangent(tensors: Iterable[Any]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def why_not_differentiable(*tensors: Tensor | None) -> str | None:
    """Why an implementation with a reverse-mode derivative alone cannot take these, or None."""
    if torch._C._functorch.maybe_current_level() is not None:
        return 'it cannot be transformed by torch.func'
    if _has_tangent(tensors):
        return 'it has no forward-mode derivative'
    return None


def refuse_tangents(arguments: Iterable[Any]) -> None:
    """Raises where an implementation would drop a tangent of forward-mode differentiation.

    Raises:
        NotImplementedError: an argument has one.
    """
    if _has_tangent(arguments):
        raise NotImplementedError(
            "this backend has no forward-mode derivative; use backend=None or backend='reference'")
