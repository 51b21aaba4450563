"""The predictor after its first product: GELU, 3x3 convolution and the maps in one kernel, and three kernels back.

Pixels are counted through all images. Hidden maps are tokens `(B, T, HIDDEN)` in which P prefix tokens stand before the
H W pixels of an image; they are kept before bias and activation.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot
from .launch import on_device, start
from .maps import fill_gradient, tanh

# Programs that sum the gradient of each tap of the convolution: fixed, so that results never vary.
PARTS = 32


@triton.jit
def load_hidden(p_hidden, p_bias, token, m, HIDDEN: tl.constexpr, WIDTH: tl.constexpr):
    """`(len(token), WIDTH)`: what the activation gets, zero beyond HIDDEN and where `m` does not hold."""
    c = tl.arange(0, WIDTH)
    m_c = m[:, None] & (c < HIDDEN)[None, :]
    hidden = tl.load(p_hidden + token[:, None] * HIDDEN + c[None, :], mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + c, mask=c < HIDDEN, other=0.0).to(tl.float32)
    return tl.where(m_c, hidden + bias[None, :], 0.0)


@triton.jit
def normal(x):
    """Distribution function of the standard normal distribution."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def load_tap(p_weight, s_wk, s_wc, s_wy, s_wx, tap, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
             KP: tl.constexpr):
    """`(WIDTH, KP)`: what a tap of the convolution multiplies by."""
    c = tl.arange(0, WIDTH)
    k = tl.arange(0, KP)
    return tl.load(p_weight + tap // 3 * s_wy + tap % 3 * s_wx + c[:, None] * s_wc + k[None, :] * s_wk,
                   mask=(c < HIDDEN)[:, None] & (k < ROWS)[None, :], other=0.0)


@triton.jit
def predict(p_hidden, p_bias1, p_weight, p_bias2, p_logits, p_sigma, s_wk, s_wc, s_wy, s_wx,
            total, tokens, prefix, height, width, out_height, out_width, bound, largest, floor,
            HIDDEN: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SUPPORTS: tl.constexpr,
            KP: tl.constexpr, STRIDE: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK: tl.constexpr):
    """One program makes logits and supports of BLOCK pixels."""
    dtype = p_hidden.dtype.element_ty
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixels = height * width
    image = (n // pixels).to(tl.int64)
    pixel = n % pixels
    y = pixel // width
    x = pixel % width
    acc = tl.zeros((BLOCK, KP), tl.float32)
    for tap in range(9):
        at_y = y + tap // 3 - 1
        at_x = x + tap % 3 - 1
        m = (n < total) & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        h = load_hidden(p_hidden, p_bias1, image * tokens + prefix + at_y * width + at_x, m, HIDDEN, WIDTH)
        weight = load_tap(p_weight, s_wk, s_wc, s_wy, s_wx, tap, HIDDEN, WIDTH, GROUPS + SUPPORTS, KP)
        acc = dot((h * normal(h)).to(dtype), weight.to(dtype), acc, PRECISION)
    k = tl.arange(0, KP)
    raw = acc + tl.load(p_bias2 + k, mask=k < GROUPS + SUPPORTS, other=0.0).to(tl.float32)[None, :]
    logit = raw
    if BOUNDED:
        logit = bound * tanh(raw / bound)
    tl.store(p_logits + (image[:, None] * GROUPS + k[None, :]) * pixels + pixel[:, None], logit,
             mask=(n < total)[:, None] & (k < GROUPS)[None, :])
    is_cell = (n < total) & (y % STRIDE == 0) & (x % STRIDE == 0)
    cell = (y // STRIDE) * out_width + x // STRIDE
    at = (image[:, None] * SUPPORTS + (k - GROUPS)[None, :]) * (out_height * out_width) + cell[:, None]
    is_support = (k >= GROUPS) & (k < GROUPS + SUPPORTS)
    tl.store(p_sigma + at, floor + largest * tl.sigmoid(raw), mask=is_cell[:, None] & is_support[None, :])


@triton.jit
def load_grad(p_grad, image, y, x, m, height, width, ROWS: tl.constexpr, KP: tl.constexpr):
    """`(len(y), KP)`: gradient of the convolution's output, kept as tokens, at pixels of which some lie outside."""
    k = tl.arange(0, KP)
    m = m & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = (image * (height * width) + y * width + x) * ROWS
    return tl.load(p_grad + at[:, None] + k[None, :], mask=m[:, None] & (k < ROWS)[None, :], other=0.0)


@triton.jit
def place_of_token(n, total, tokens, prefix, width):
    """Image, row and column of tokens counted through all images, and which of them are pixels."""
    pixel = n % tokens - prefix
    return (n // tokens).to(tl.int64), pixel // width, pixel % width, (n < total) & (pixel >= 0)


@triton.jit
def unpredict(p_grad, p_hidden, p_bias1, p_weight, p_dhidden, p_dweight, p_dbias2, p_dbias1, s_wk, s_wc, s_wy, s_wx,
              total, tokens, prefix, height, width,
              HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The first 9 PARTS programs sum the gradient of a tap over a part of the tokens each, and tap 4 that of the second
    bias; as many others make the gradient of the hidden map, and sum that of the first bias."""
    dtype = p_hidden.dtype.element_ty
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    k = tl.arange(0, KP)
    if pid < 9 * PARTS:
        part = pid // 9
        tap = pid % 9
        dweight = tl.zeros((WIDTH, KP), tl.float32)
        dbias2 = tl.zeros((KP,), tl.float32)
        for start in range(part * BLOCK, total, PARTS * BLOCK):
            n = start + i
            image, y, x, m = place_of_token(n, total, tokens, prefix, width)
            h = load_hidden(p_hidden, p_bias1, n.to(tl.int64), m, HIDDEN, WIDTH)
            grad = load_grad(p_grad, image, y - tap // 3 + 1, x - tap % 3 + 1, m, height, width, ROWS, KP)
            dweight = dot(tl.trans((h * normal(h)).to(dtype)), grad, dweight, PRECISION)
            dbias2 += tl.sum(grad.to(tl.float32), 0)
        tl.store(p_dweight + (pid * WIDTH + c)[:, None] * KP + k[None, :], dweight)
        if tap == 4:
            tl.store(p_dbias2 + part * KP + k, dbias2)
    else:
        pid -= 9 * PARTS
        dbias1 = tl.zeros((WIDTH,), tl.float32)
        for start in range(pid * BLOCK, total, 9 * PARTS * BLOCK):
            n = start + i
            image, y, x, m = place_of_token(n, total, tokens, prefix, width)
            dhidden = tl.zeros((BLOCK, WIDTH), tl.float32)
            for tap in range(9):
                grad = load_grad(p_grad, image, y - tap // 3 + 1, x - tap % 3 + 1, m, height, width, ROWS, KP)
                weight = load_tap(p_weight, s_wk, s_wc, s_wy, s_wx, tap, HIDDEN, WIDTH, ROWS, KP)
                dhidden = dot(grad, tl.trans(weight.to(dtype)), dhidden, PRECISION)
            h = load_hidden(p_hidden, p_bias1, n.to(tl.int64), m, HIDDEN, WIDTH)
            dhidden *= normal(h) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
            dbias1 += tl.sum(dhidden, 0)
            tl.store(p_dhidden + n.to(tl.int64)[:, None] * HIDDEN + c[None, :], dhidden.to(dtype),
                     mask=(n < total)[:, None] & (c < HIDDEN)[None, :])
        tl.store(p_dbias1 + pid * WIDTH + c, dbias1)


@triton.jit
def finish(p_dweight, p_dbias2, p_dbias1, p_weight, p_bias2, p_bias1, s_wk, s_wc, s_wy, s_wx,
           HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr):
    """One program sums a row of the parts that `unpredict` left: of a tap and hidden channel, or a bias."""
    pid = tl.program_id(0)
    k = tl.arange(0, KP)
    p = tl.arange(0, PARTS)
    if pid < 9 * HIDDEN:
        tap = pid // HIDDEN
        c = pid % HIDDEN
        parts = tl.load(p_dweight + ((p * 9 + tap) * WIDTH + c)[:, None] * KP + k[None, :])
        at = k * s_wk + c * s_wc + tap // 3 * s_wy + tap % 3 * s_wx
        tl.store(p_weight + at, tl.sum(parts, 0).to(p_weight.dtype.element_ty), mask=k < ROWS)
    elif pid == 9 * HIDDEN:
        dbias2 = tl.sum(tl.load(p_dbias2 + p[:, None] * KP + k[None, :]), 0)
        tl.store(p_bias2 + k, dbias2.to(p_bias2.dtype.element_ty), mask=k < ROWS)
    else:
        c = tl.arange(0, WIDTH)
        dbias1 = tl.zeros((WIDTH,), tl.float32)
        for part in range(9):
            dbias1 += tl.sum(tl.load(p_dbias1 + (part * PARTS + p)[:, None] * WIDTH + c[None, :]), 0)
        tl.store(p_bias1 + c, dbias1.to(p_bias1.dtype.element_ty), mask=c < HIDDEN)


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _config(hidden: Tensor) -> dict[str, int]:
    """Pixels of a block and launch options, without spilled registers."""
    size = hidden.element_size() * _padded(hidden.shape[2])
    return {'BLOCK': 64 if size <= 128 else 32 if size <= 256 else 16, 'num_warps': 4 if size <= 128 else 8,
            'num_stages': 1}


def _precision(x: Tensor) -> str:
    return 'tf32x3' if x.dtype == torch.float32 else 'ieee'


def fill_predicted(
        hidden: Tensor, bias1: Tensor, weight: Tensor, bias2: Tensor, weight_logits: Tensor, sigma: Tensor,
        stride: int, bound: float, largest: float, floor: float) -> None:
    """Fills `weight_logits` and `sigma`, contiguous and in fp32, from the hidden map, contiguous tokens."""
    b, groups, height, width = weight_logits.shape
    total = b * height * width
    config = _config(hidden)
    if total:
        with on_device(hidden):
            start(
                predict, triton.cdiv(total, config['BLOCK']), (hidden, bias1, weight, bias2, weight_logits, sigma),
                (*weight.stride(), total, hidden.shape[1], hidden.shape[1] - height * width, height, width,
                 *sigma.shape[2:], bound, largest, floor),
                HIDDEN=hidden.shape[2], WIDTH=_padded(hidden.shape[2]), GROUPS=groups, SUPPORTS=sigma.shape[1],
                KP=_padded(weight.shape[0]), STRIDE=stride, BOUNDED=bound > 0, PRECISION=_precision(hidden),
                **config)


def predicted_gradients(
        grad_logits: Tensor, grad_sigma: Tensor, weight_logits: Tensor, sigma: Tensor, hidden: Tensor, bias1: Tensor,
        weight: Tensor, bias2: Tensor, stride: int, bound: float, largest: float, floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the hidden map, the first bias, the weight and the second bias of `fill_predicted`."""
    b, _, height, width = weight_logits.shape
    rows, channels = weight.shape[:2]
    grads = tuple(torch.empty_like(t) for t in (hidden, bias1, weight, bias2))
    if not hidden.numel():
        return tuple(t.zero_() for t in grads)  # type: ignore[return-value]
    dhidden, dbias1, dweight, dbias2 = grads
    grad = hidden.new_empty(b, height, width, rows)
    fill_gradient(
        grad_logits, grad_sigma, weight_logits, sigma, grad.permute(0, 3, 1, 2), stride, bound, largest, floor)
    cp, kp = _padded(channels), _padded(rows)
    sizes = {'HIDDEN': channels, 'WIDTH': cp, 'ROWS': rows, 'KP': kp, 'PARTS': PARTS}
    parts = [weight_logits.new_empty(PARTS, n) for n in (9 * cp * kp, kp, 9 * cp)]
    with on_device(hidden):
        start(
            unpredict, 18 * PARTS, (grad, hidden, bias1, weight, dhidden, *parts),
            (*weight.stride(), hidden.shape[0] * hidden.shape[1], hidden.shape[1],
             hidden.shape[1] - height * width, height, width),
            PRECISION=_precision(hidden), **_config(hidden), **sizes)
        start(finish, 9 * channels + 2, (*parts, dweight, dbias2, dbias1), dweight.stride(), **sizes)
    return dhidden, dbias1, dweight, dbias2
