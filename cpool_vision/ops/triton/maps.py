"""Weight logits and supports from the predictor's output, and back: one kernel each, elementwise."""
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .common import INTERPRETED
from .launch import on_device, start

BLOCK = 512


@triton.jit
def tanh(x):
    """Exact near zero too: `(1 - e) / (1 + e)` with `e = exp(-2 |x|)` would cancel there."""
    if INTERPRETED:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return libdevice.tanh(x)


@triton.jit
def make(p_raw, p_logits, p_sigma, s_rb, s_rk, s_rh, s_rw, total, height, width, out_height, out_width,
         bound, largest, floor,
         GROUPS: tl.constexpr, SUPPORTS: tl.constexpr, STRIDE: tl.constexpr, BOUNDED: tl.constexpr,
         BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """One program makes BLOCK elements, of the logits and then of the supports of each image."""
    n = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    pixels = height * width
    pixel = n % pixels
    row = n // pixels % (GROUPS + SUPPORTS)
    image = (n // pixels // (GROUPS + SUPPORTS)).to(tl.int64)
    y = pixel // width
    x = pixel % width
    raw = tl.load(p_raw + image * s_rb + row * s_rk + y * s_rh + x * s_rw, mask=n < total, other=0.0).to(tl.float32)
    logit = raw
    if BOUNDED:
        logit = bound * tanh(raw / bound)
    is_logit = row < GROUPS
    tl.store(p_logits + (image * GROUPS + row) * pixels + pixel, logit, mask=(n < total) & is_logit)
    is_cell = (y % STRIDE == 0) & (x % STRIDE == 0)
    cell = ((image * SUPPORTS + row - GROUPS) * out_height + y // STRIDE) * out_width + x // STRIDE
    tl.store(p_sigma + cell, floor + largest * tl.sigmoid(raw), mask=(n < total) & (row >= GROUPS) & is_cell)


@triton.jit
def unmake(p_dlogits, p_dsigma, p_logits, p_sigma, p_grad, s_lb, s_lg, s_lh, s_lw, s_sb, s_sg, s_sh, s_sw,
           s_rb, s_rk, s_rh, s_rw, total, rows, height, width, out_height, out_width, bound, largest, floor,
           GROUPS: tl.constexpr, SUPPORTS: tl.constexpr, STRIDE: tl.constexpr, BOUNDED: tl.constexpr,
           BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """One program makes BLOCK elements of the gradient; rows that are neither logits nor supports get zeros."""
    n = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    pixels = height * width
    pixel = n % pixels
    row = n // pixels % rows
    image = (n // pixels // rows).to(tl.int64)
    y = pixel // width
    x = pixel % width
    is_logit = (n < total) & (row < GROUPS)
    grad = tl.load(p_dlogits + image * s_lb + row * s_lg + y * s_lh + x * s_lw, mask=is_logit, other=0.0)
    if BOUNDED:
        share = tl.load(p_logits + (image * GROUPS + row) * pixels + pixel, mask=is_logit, other=0.0) / bound
        grad = grad * (1.0 - share * share)
    is_cell = (n < total) & (row >= GROUPS) & (row < GROUPS + SUPPORTS) & (y % STRIDE == 0) & (x % STRIDE == 0)
    y = y // STRIDE
    x = x // STRIDE
    d_sigma = tl.load(p_dsigma + image * s_sb + (row - GROUPS) * s_sg + y * s_sh + x * s_sw, mask=is_cell, other=0.0)
    cell = ((image * SUPPORTS + row - GROUPS) * out_height + y) * out_width + x
    share = (tl.load(p_sigma + cell, mask=is_cell, other=0.0) - floor) / largest
    grad += tl.where(is_cell, d_sigma * (share * (1.0 - share) * largest), 0.0)
    at = image * s_rb + row * s_rk + (pixel // width) * s_rh + (pixel % width) * s_rw
    tl.store(p_grad + at, grad.to(p_grad.dtype.element_ty), mask=n < total)


def _index(total: int) -> Any:
    """Type that counts so many elements; divisions in 64 bits are slow."""
    return tl.int32 if total + BLOCK < 2 ** 31 else tl.int64


def fill_maps(
        raw: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int, bound: float, largest: float, floor: float,
) -> None:
    """Fills `weight_logits` and `sigma`, contiguous and in fp32, from `raw` of any strides."""
    b, groups, height, width = weight_logits.shape
    supports = sigma.shape[1]
    total = b * (groups + supports) * height * width
    if total:
        with on_device(raw):
            start(
                make, triton.cdiv(total, BLOCK), (raw, weight_logits, sigma),
                (*raw.stride(), total, height, width, *sigma.shape[2:], bound, largest, floor),
                GROUPS=groups, SUPPORTS=supports, STRIDE=stride, BOUNDED=bound > 0, BLOCK=BLOCK, INDEX=_index(total))


def fill_gradient(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, grad: Tensor, stride: int,
        bound: float, largest: float, floor: float) -> None:
    """Fills `grad`, that of what `fill_maps` read, of any strides and at least as many rows."""
    _, groups, height, width = weight_logits.shape
    total = grad.numel()
    if total:
        with on_device(grad):
            start(
                unmake, triton.cdiv(total, BLOCK), (grad_logits, grad_sigma, weight_logits, sigma, grad),
                (*grad_logits.stride(), *grad_sigma.stride(), *grad.stride(), total, grad.shape[1], height, width,
                 *sigma.shape[2:], bound, largest, floor),
                GROUPS=groups, SUPPORTS=sigma.shape[1], STRIDE=stride, BOUNDED=bound > 0, BLOCK=BLOCK,
                INDEX=_index(total))
