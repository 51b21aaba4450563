"""The kernels on tensors: layouts, dtypes and memory."""
import ctypes

import torch
from torch import Tensor

from .. import workspace
from ..checks import check_arguments, check_gradient, check_out
from ..layout import empty_maps, is_channels_last
from ..plan import TOLERANCE
from .build import BuildError, Shape, load

# As in shared.h.
RATIOS = 16
# Of a temporary in another layout or dtype than the caller's: held in the cache, and not as large as the batch.
CHUNK_ELEMENTS = 1 << 21
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _library() -> ctypes.CDLL:
    library = load()
    if isinstance(library, BuildError):
        raise library
    return library


def _call(name: str, shape: Shape, *tensors: Tensor) -> None:
    if getattr(_library(), name)(ctypes.byref(shape), *(t.data_ptr() for t in tensors)):
        raise MemoryError(f'{name} found no memory for the temporaries of a {shape.height}x{shape.width} map')


def _transpose(t: Tensor, out: Tensor) -> None:
    """Writes contiguous `(B, R, C)` to contiguous `(B, C, R)`."""
    _library().cpool_transpose(*t.shape, torch.get_num_threads(), t.data_ptr(), out.data_ptr())


def _has_adjacent_channels(x: Tensor) -> bool:
    """Whether pixels in fp32 are evenly spaced and hold their channels side by side, as in tokens and channels-last."""
    return _is_direct(x) and x.stride(1) == 1 and x.shape[1] > 1


def _is_direct(x: Tensor) -> bool:
    """Whether the kernels read or write an output where it lies: fp32, with evenly spaced pixels."""
    h, w = x.shape[2:]
    return x.dtype == torch.float32 and (h == 1 or w == 1 or x.stride(2) == w * x.stride(3))


def _pixel_stride(x: Tensor) -> int:
    return x.stride(2) if x.shape[3] == 1 else x.stride(3)


def _shape(
        x: Tensor, y: Tensor, groups: int, sigma: Tensor, stride: int, x_strides: tuple[int, int],
        dx_strides: tuple[int, int] = (0, 0), bands: int = 1) -> Shape:
    b, c, h, w = x.shape
    return Shape(
        b * groups, groups, c // groups, h, w, *sigma.shape[2:], stride, *x_strides, *dx_strides,
        y.stride(0), _pixel_stride(y), y.stride(1), bands, groups // sigma.shape[1], torch.get_num_threads(),
        TOLERANCE[torch.float32])


def _bands(sigma: Tensor) -> int:
    """With fewer maps than threads, a map is cut into bands, each with its own sums."""
    maps, threads = sigma.shape[0] * sigma.shape[1], torch.get_num_threads()
    return 1 if maps >= threads else min(-(-2 * threads // maps), -(-sigma.shape[2] // 4))


def _take_folded(x: Tensor, groups: int, sigma: Tensor, like: Tensor) -> tuple[Tensor, int]:
    """Memory for what shared.h makes of features, and how many floats of it have a gradient; none without sharing."""
    b, c, h, w = x.shape
    support_groups = sigma.shape[1]
    shared = groups // support_groups
    if shared == 1:
        return like.new_empty(0), 0
    pixels = b * support_groups * h * w
    size = pixels * (c // support_groups + -(-shared // RATIOS) * RATIOS)
    # One more for every pixel: the largest weight of its groups.
    return workspace.take('folded', like, size + pixels), size


def _maps_like(x: Tensor, slot: str, like: Tensor) -> Tensor:
    """Memory for maps of the shape and layout of `x` in fp32, the dtype of `like`."""
    b, c, h, w = x.shape
    if is_channels_last(x, 1):
        return workspace.take(slot, like, b, h, w, c).permute(0, 3, 1, 2)
    return workspace.take(slot, like, b, c, h, w)


def _with_pixels_first(x: Tensor, like: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """`x` in fp32 with its channels side by side, and the strides of images and pixels."""
    if _has_adjacent_channels(x):
        return x, (x.stride(0), _pixel_stride(x))
    b, c, h, w = x.shape
    pixels = workspace.take('pixels', like, b, h * w, c)
    if x.is_contiguous():
        maps = x if x.dtype == torch.float32 else _maps_like(x, 'maps', like).copy_(x)
        _transpose(maps.flatten(2), pixels)
    else:
        pixels.view(b, h, w, c).copy_(x.permute(0, 2, 3, 1))
    return pixels, (h * w * c, c)


def _from_pixels(pixels: Tensor, out: Tensor) -> None:
    """Writes fp32 `(B, H * W, C)` to maps `(B, C, H, W)` of any dtype and layout."""
    b, c, h, w = out.shape
    if out.is_contiguous():
        maps = out if out.dtype == torch.float32 else _maps_like(out, 'maps', pixels)
        _transpose(pixels, maps)
        if maps is not out:
            out.copy_(maps)
    else:
        out.permute(0, 2, 3, 1).copy_(pixels.view(b, h, w, c))


def _check(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> None:
    check_arguments(x, weight_logits, sigma, stride)
    if x.device.type != 'cpu' or x.dtype not in DTYPES:
        raise NotImplementedError(
            f"backend='native' takes {', '.join(map(str, DTYPES))} on the CPU, got {x.dtype} on {x.device}; "
            f'pass backend=None to use another')


def _chunks(x: Tensor, groups: int, sigma: Tensor, direct: bool) -> list[slice]:
    """Ranges of images that go through the kernels at once: all where they need no temporaries."""
    if not x.numel():
        return []
    b = size = x.shape[0]
    if not direct or groups > sigma.shape[1] or not _has_adjacent_channels(x):
        # Every thread takes the supports of one image at a time: there are enough for all.
        size = max(CHUNK_ELEMENTS // x[0].numel(), -(-torch.get_num_threads() // sigma.shape[1]))
    return [slice(i, i + size) for i in range(0, b, size)]


def native_forward(
        x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, out: Tensor | None = None) -> Tensor:
    """Pools `x`, see `context_pool2d`; returns the maps in the dtype and layout of `x`, or fills `out` of any layout.

    fp32 maps whose pixels are evenly spaced, such as tokens after a prefix, are written where they lie.
    """
    _check(x, weight_logits, sigma, stride)
    shape = (*x.shape[:2], *sigma.shape[2:])
    if out is not None:
        check_out('out', out, shape, x)
    y = out if out is not None else empty_maps(x, shape, is_channels_last(x, 1))
    groups, direct = weight_logits.shape[1], _is_direct(y)
    logits, supports = weight_logits.float().contiguous(), sigma.float().contiguous()
    scratch = torch.empty_like(logits)
    for part in _chunks(x, groups, sigma, direct):
        pixels, strides = _with_pixels_first(x[part], logits)
        folded, _ = _take_folded(x[part], groups, sigma, logits)
        result = y[part] if direct else _maps_like(y[part], 'results', logits)
        _call('cpool_forward', _shape(x[part], result, groups, sigma[part], stride, strides),
              pixels, logits[part], supports[part], scratch[part], folded, result)
        if not direct:
            y[part].copy_(result)
    return y


def native_backward(
        grad: Tensor, x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight_logits` and `sigma`, each in the dtype and layout of its input.

    That of `x` fills `dx` of any layout where given.
    """
    _check(x, weight_logits, sigma, stride)
    check_gradient(grad, x, sigma)
    if dx is not None:
        check_out('dx', dx, tuple(x.shape), x)
    else:
        dx = empty_maps(x, x.shape, is_channels_last(x, 1))
    groups, bands = weight_logits.shape[1], _bands(sigma) if x.numel() else 1
    direct, whole = _is_direct(grad), bands == 1 and _has_adjacent_channels(dx)
    logits, supports = weight_logits.float().contiguous(), sigma.float().contiguous()
    dlogits, dsigma = torch.zeros_like(logits), torch.zeros_like(supports)
    scratch = torch.empty_like(logits)
    for part in _chunks(x, groups, sigma, direct and whole):
        dy = grad[part] if direct else _maps_like(grad[part], 'output gradients', logits).copy_(grad[part])
        pixels, strides = _with_pixels_first(x[part], logits)
        b, c, h, w = x[part].shape
        folded, size = _take_folded(x[part], groups, sigma, logits)
        dfolded = workspace.take('folded gradients', logits, bands * size).zero_()
        if whole:
            sums, dx_strides = dx[part], (dx.stride(0), _pixel_stride(dx))
        else:
            sums, dx_strides = workspace.take('gradients', logits, bands, b, h * w, c), (h * w * c, c)
        dweights = torch.zeros(bands, *logits[part].shape)
        _call('cpool_backward', _shape(x[part], dy, groups, sigma[part], stride, strides, dx_strides, bands),
              dy, pixels, logits[part], supports[part], scratch[part], folded, dfolded, sums.zero_(), dweights,
              dsigma[part])
        dlogits[part] = dweights.sum(0)
        if not whole:
            _from_pixels(sums[0] if bands == 1 else sums.sum(0), dx[part])
    # One division at a time: the cube of a small support underflows.
    for _ in range(3):
        dsigma = dsigma / supports
    return dx, dlogits.to(weight_logits.dtype), dsigma.to(sigma.dtype)
