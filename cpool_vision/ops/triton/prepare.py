"""The first kernel: what every other needs of logits and supports, once for every plane."""
import triton
import triton.language as tl

from .common import EVERYTHING, LOG2, LOG2E, LOG2E_REST, WIDE, least_square, nearest, padded


@triton.jit
def prepare(
        p_logits, p_sigma, p_kept, s_lb, s_lg, s_lh, s_lw, s_sb, s_sg, s_sh, s_sw,
        height, width, out_height, out_width, groups, shared, kept_size, log_tolerance, limit, shift,
        XW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """One program keeps weights, their logarithms, scales and radii of a plane (see `layout.Kept`).

    What a query leaves out lies beyond its radius along one axis. Relative to the nearest pixel, whose logit lies `own`
    below the map's largest, the four sides weigh at most `4 (1 + sigma / 5) (1 + sqrt(2 pi) sigma) exp(own - L)` at the
    radius `sqrt(near + 2 sigma^2 L)`, `near` being the nearest pixel's squared distance: a Gaussian sum over integers
    is at most its integral plus its largest term, and L > 12.5. The radius makes this the tolerance, times `sigma^3`
    for supports below one pixel, since the gradient of a support multiplies by `sigma^-3`.
    """
    plane = tl.program_id(0)
    batch = (plane // groups).to(tl.int64)
    p_logits += batch * s_lb + (plane % groups).to(tl.int64) * s_lg
    p_sigma += batch * s_sb + (plane % groups // shared).to(tl.int64) * s_sg
    p_kept += plane.to(tl.int64) * kept_size
    i = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float('inf'), tl.float32)
    for start in range(0, height * width, BLOCK):
        n = start + i
        logit = tl.load(p_logits + n // width * s_lh + n % width * s_lw, mask=n < height * width,
                        other=-float('inf')).to(tl.float32)
        # A logit that is not a number makes the plane so: nothing weighs anything against an infinite one.
        largest = tl.maximum(largest, tl.where(logit == logit, logit, float('inf')))
    peak = tl.max(largest, 0)

    rows = padded(height)
    keys = tl.cdiv(width, XW) * XW * rows
    for start in range(0, keys, BLOCK):
        n = start + i
        y = n // XW % rows
        x = n // XW // rows * XW + n % XW
        inside = (y < height) & (x < width)
        logit = tl.load(p_logits + y * s_lh + x * s_lw, mask=inside & (n < keys), other=-float('inf')).to(tl.float32)
        below = logit - peak
        log_w = below * LOG2E + shift
        # Without a finite logit there is nothing to pool: not a number, as in a softmax.
        log_w = tl.where(inside, log_w, -float('inf'))
        # What the difference and the product were rounded by.
        rest = (logit - (below + peak)) * LOG2E + tl.fma(below, LOG2E, -(below * LOG2E)) + below * LOG2E_REST
        w = tl.exp2(log_w)
        tl.store(p_kept + n, tl.where(w > 0, w + w * (rest * LOG2), w), mask=n < keys)
        tl.store(p_kept + keys + n, log_w, mask=n < keys)

    rows = padded(out_height)
    queries = tl.cdiv(out_width, XW) * XW * rows
    p_kept += 2 * keys
    wide = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, queries, BLOCK):
        n = start + i
        y = n // XW % rows
        x = n // XW // rows * XW + n % XW
        m = (y < out_height) & (x < out_width) & (n < queries)
        sigma = tl.load(p_sigma + y * s_sh + x * s_sw, mask=m, other=1.0).to(tl.float32)
        near_y = nearest(y, height, STRIDE)
        near_x = nearest(x, width, STRIDE)
        own = peak - tl.load(p_logits + near_y * s_lh + near_x * s_lw, mask=m, other=0.0).to(tl.float32)
        inverse = 1.0 / sigma
        scale = inverse * inverse * (0.5 * LOG2E)
        tl.store(p_kept + n, tl.where(m, tl.where(scale > 1e30, 1e30, scale), 0.0), mask=n < queries)
        # Until the pooling kernel says so: padded queries weigh nothing.
        tl.store(p_kept + queries + n, tl.full((BLOCK,), float('inf'), tl.float32), mask=n < queries)
        tl.store(p_kept + 2 * queries + n, tl.zeros((BLOCK,), tl.float32), mask=n < queries)
        bound = tl.log(4.0 * (1.0 + 0.2 * sigma) * (1.0 + 2.5066283 * sigma)) - 3.0 * tl.log(tl.minimum(sigma, 1.0))
        near = least_square(y, height, STRIDE) + least_square(x, width, STRIDE)
        radius = tl.sqrt(near + 2.0 * sigma * sigma * (bound + own - log_tolerance))
        # Also where the radius is not a number: the query reads everything.
        radius = tl.where(radius < EVERYTHING, radius, EVERYTHING)
        m_wide = m & ~(own <= limit)
        radius = tl.where(m_wide, WIDE, radius)
        wide = tl.maximum(wide, m_wide.to(tl.float32))
        radius = tl.max(tl.reshape(tl.where(m, radius, -EVERYTHING), (BLOCK // XW, XW)), 1)
        line = start // XW + tl.arange(0, BLOCK // XW)
        tl.store(p_kept + 3 * queries + line, radius, mask=line < queries // XW)
    # As many as make the next plane begin aligned.
    pad = (kept_size - 2 * keys) - (3 * queries + queries // XW)
    i = tl.arange(0, 16)
    tl.store(p_kept + (3 * queries + queries // XW) + i, tl.zeros((16,), tl.float32) + tl.max(wide, 0), mask=i < pad)
