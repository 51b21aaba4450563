"""The kernels on tensors: layouts, dtypes and memory."""
import ctypes

import torch
from torch import Tensor

from .. import workspace
from ..layout import empty_maps, is_channels_last
from ..plan import TOLERANCE
from .build import BuildError, Shape, load

# Of a temporary in another layout than the caller's: held in the cache, and not as large as the batch.
CHUNK_ELEMENTS = 1 << 21


def _library() -> ctypes.CDLL:
    library = load()
    if isinstance(library, BuildError):
        raise library
    return library


def _call(name: str, shape: Shape, *tensors: Tensor) -> None:
    if getattr(_library(), name)(ctypes.byref(shape), *(t.data_ptr() for t in tensors)):
        raise MemoryError(f'{name} found no memory for the temporaries of a {shape.height}x{shape.width} map')


def _transpose(t: Tensor, out: Tensor) -> Tensor:
    """Writes contiguous `(B, R, C)` to contiguous `(B, C, R)`."""
    _library().cpool_transpose(*t.shape, torch.get_num_threads(), t.data_ptr(), out.data_ptr())
    return out


def _has_adjacent_channels(x: Tensor) -> bool:
    """Whether pixels are evenly spaced and hold their channels side by side, as in tokens and channels-last maps."""
    h, w = x.shape[2:]
    return (x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[1] > 1
            and (h == 1 or w == 1 or x.stride(2) == w * x.stride(3)))


def _pixel_stride(x: Tensor) -> int:
    return x.stride(2) if x.shape[3] == 1 else x.stride(3)


def _shape(x: Tensor, y: Tensor, sigma: Tensor, stride: int, x_strides: tuple[int, int]) -> Shape:
    b, g, ho, wo = sigma.shape
    c, h, w = x.shape[1:]
    threads = torch.get_num_threads()
    # With fewer maps than threads, a map is cut into bands, each with sums of its own.
    bands = 1 if b * g >= threads else min(-(-2 * threads // (b * g)), -(-ho // 4))
    return Shape(
        b * g, g, c // g, h, w, ho, wo, stride, *x_strides, y.stride(0), _pixel_stride(y), y.stride(1), bands, threads,
        TOLERANCE[torch.float32])


def _with_pixels_first(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """`x` with its channels side by side, and the strides of images and pixels."""
    if _has_adjacent_channels(x):
        return x, (x.stride(0), _pixel_stride(x))
    b, c, h, w = x.shape
    x = x.to(torch.float32)
    pixels = workspace.take('pixels', x, b, h * w, c)
    if x.is_contiguous():
        _transpose(x.flatten(2), pixels)
    else:
        pixels.view(b, h, w, c).copy_(x.permute(0, 2, 3, 1))
    return pixels, (h * w * c, c)


def _even(y: Tensor) -> Tensor:
    """`y` in fp32, copied unless its pixels are evenly spaced."""
    y = y.to(torch.float32)
    h, w = y.shape[2:]
    return y if h == 1 or w == 1 or y.stride(2) == w * y.stride(3) else y.contiguous()


def _chunks(x: Tensor) -> list[slice]:
    """Ranges of images that go through the kernels at once."""
    b = x.shape[0]
    size = b if _has_adjacent_channels(x) else max(1, CHUNK_ELEMENTS // max(1, x[0].numel()))
    return [slice(i, i + size) for i in range(0, b, size)]


def native_forward(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> Tensor:
    """Pools `x`, see `context_pool2d`; returns the maps in the dtype and layout of `x`."""
    y = empty_maps(x, (*x.shape[:2], *sigma.shape[2:]), is_channels_last(x, 1), torch.float32)
    if x.numel():
        logits, supports = weight_logits.float().contiguous(), sigma.float().contiguous()
        scratch = torch.empty_like(logits)
        for part in _chunks(x):
            pixels, strides = _with_pixels_first(x[part])
            _call('cpool_forward', _shape(x[part], y, sigma[part], stride, strides),
                  pixels, logits[part], supports[part], scratch[part], y[part])
    return y.to(x.dtype)


def native_backward(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight_logits` and `sigma`, each in the dtype and layout of its input."""
    channels_last = is_channels_last(x, 1)
    dx = empty_maps(x, x.shape, channels_last, torch.float32)
    logits, supports = weight_logits.float().contiguous(), sigma.float().contiguous()
    dlogits, dsigma, scratch = torch.empty_like(logits), torch.empty_like(supports), torch.empty_like(logits)
    for part in _chunks(x) if x.numel() else ():
        dy = _even(grad[part])
        pixels, strides = _with_pixels_first(x[part])
        shape = _shape(x[part], dy, sigma[part], stride, strides)
        b, c, h, w = x[part].shape
        whole = channels_last and shape.bands == 1
        sums = dx[part].permute(0, 2, 3, 1) if whole else workspace.take('gradients', dx, shape.bands, b, h * w, c)
        dweights = torch.zeros(shape.bands, *logits[part].shape)
        _call('cpool_backward', shape, dy, pixels, logits[part], supports[part], scratch[part],
              sums.zero_(), dweights, dsigma[part])
        dlogits[part] = dweights.sum(0)
        if not whole:
            total = sums[0] if shape.bands == 1 else sums.sum(0)
            if channels_last:
                dx[part].permute(0, 2, 3, 1).copy_(total.view(b, h, w, c))
            else:
                _transpose(total, dx[part])
    # One division at a time: the cube of a small support underflows.
    for _ in range(3):
        dsigma = dsigma / supports
    return dx.to(x.dtype), dlogits.to(weight_logits.dtype), dsigma.to(sigma.dtype)
