"""The pooling kernel: a tile of queries passes over the key chunks in reach."""
import triton
import triton.language as tl

from .common import (
    WIDE,
    cell,
    center,
    dot,
    exponents,
    follow,
    key_window,
    least_square,
    locate,
    offset,
    padded,
    query_reach,
    squares,
)


@triton.jit
def largest_exponent(p_log_w, scale, row, col, least_y, least_x, ya, yb, xa, xb, rows,
                     CHUNK: tl.constexpr, XW: tl.constexpr, STRIDE: tl.constexpr):
    """Of every query over the keys it reads, in units of log2; 0 where every one is -inf."""
    k = tl.arange(0, CHUNK * XW)
    top = tl.full((row.shape[0],), -float('inf'), tl.float32)
    for b in range(xa, xb):
        dx2 = squares(col[:, None], (b * XW + k % XW).to(tl.float32)[None, :], least_x[:, None], STRIDE)
        for y in range(ya, yb, CHUNK):
            dy2 = squares(row[:, None], (y + k // XW).to(tl.float32)[None, :], least_y[:, None], STRIDE)
            log_w = tl.load(p_log_w + (b * rows + y) * XW + k)
            top = tl.maximum(top, tl.max(exponents(log_w[None, :], scale[:, None], dx2, dy2), 1))
    return tl.where(top > -float('inf'), top, 0.0)


@triton.jit
def keys_at(p_chunk, at, c, m_k, CHANNELS: tl.constexpr, WHOLE_C: tl.constexpr):
    """Features of a chunk's keys, `(keys, channels)`: all of a block's, or those that the group has."""
    if WHOLE_C:
        return tl.load(p_chunk + at, mask=m_k[:, None], other=0.0)
    return tl.load(p_chunk + at, mask=m_k[:, None] & (c < CHANNELS)[None, :], other=0.0)


@triton.jit
def pool_window(
        p_x, p_w, s_xc, s_xh, s_xw, scale, top, shift, row, col, least_y, least_x, ya, yb, xa, xb, height, width, rows,
        block,
        CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, XW: tl.constexpr,
        STRIDE: tl.constexpr, IN_LOGS: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
        INDEX: tl.constexpr):
    """Weighted sums of the features and of the weights, both with weights as rounded, over the keys of a window.

    Weights are products of a factor for columns, formed once a block, one for rows, and the key's own, relative to the
    map's largest logit; or, IN_LOGS, formed from logarithms relative to `top`. `p_w` is of one or the other.
    """
    QUERIES: tl.constexpr = row.shape[0]
    KEYS: tl.constexpr = CHUNK * XW
    WHOLE_C: tl.constexpr = CHANNELS % BLOCK_C == 0 or TAIL > 0
    dtype = p_x.dtype.element_ty
    k = tl.arange(0, KEYS)
    kr = k // XW
    kc = k % XW
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = kr.to(INDEX) * s_xh + kc.to(INDEX) * s_xw
    at_c = at[:, None] + (c.to(INDEX) * s_xc)[None, :]
    acc = tl.zeros((QUERIES, BLOCK_C), tl.float32)
    if TAIL:
        t = BLOCK_C + tl.arange(0, TAIL)
        at_t = at[:, None] + (t.to(INDEX) * s_xc)[None, :]
        tail = tl.zeros((QUERIES, TAIL), tl.float32)
    else:
        tail = acc
    # Summed by a product with ones, which leaves weights where they are.
    ones = tl.full((KEYS, 16), 1.0, tl.float32).to(dtype)
    sums = tl.zeros((QUERIES, 16), tl.float32)
    # A product that only shows the compiler in which layout to form the weights: that of the operand of the next.
    like = dot(tl.full((QUERIES, 16), 1.0, tl.float32).to(dtype), tl.full((16, KEYS), 1.0, tl.float32).to(dtype),
               tl.zeros((QUERIES, KEYS), tl.float32), PRECISION)
    for b in range(xa, xb):
        dx2 = squares(col[:, None], (b * XW + kc).to(tl.float32)[None, :], least_x[:, None], STRIDE)
        if not IN_LOGS:
            factor = follow(tl.exp2(-scale[:, None] * dx2), like)
        m_x = b * XW + kc < width
        p_block = p_x + offset(b, INDEX) * (XW * s_xw)
        p_row = p_w + b * rows * XW
        if PREFETCH:
            next_v = keys_at(p_block + offset(ya, INDEX) * s_xh, at_c, c, m_x & (kr < height - ya), CHANNELS, WHOLE_C)
            next_w = tl.load(p_row + ya * XW + k)
        for y in range(ya, yb, CHUNK):
            if PREFETCH:
                v = next_v
                w = next_w
                # Past the last row nothing is read; the kept weights are padded.
                after = y + CHUNK
                next_v = keys_at(p_block + offset(after, INDEX) * s_xh, at_c, c, m_x & (kr < height - after),
                                 CHANNELS, WHOLE_C)
                next_w = tl.load(p_row + tl.minimum(after, rows - CHUNK) * XW + k)
            else:
                v = keys_at(p_block + offset(y, INDEX) * s_xh, at_c, c, m_x & (kr < height - y), CHANNELS, WHOLE_C)
                w = tl.load(p_row + y * XW + k)
            if TAIL:
                v_t = keys_at(p_block + offset(y, INDEX) * s_xh, at_t, t, m_x & (kr < height - y), CHANNELS, False)
            dy2 = squares(row[:, None], (y + kr).to(tl.float32)[None, :], least_y[:, None], STRIDE)
            if IN_LOGS:
                a = exponents(w[None, :], scale[:, None], dx2, dy2) - top[:, None]
                a = follow(tl.exp2(a + shift), like)
            else:
                a = factor * (tl.exp2(-scale[:, None] * dy2) * w[None, :])
            a = a.to(dtype)
            sums = dot(a, ones, sums, PRECISION)
            acc = dot(a, v, acc, PRECISION)
            if TAIL:
                tail = dot(a, v_t, tail, PRECISION)
    return acc, tail, tl.max(sums, 1)


@triton.jit
def pool(
        p_x, p_y, p_kept, s_xb, s_xc, s_xh, s_xw, s_yb, s_yc, s_yh, s_yw,
        height, width, out_height, out_width, groups, kept_size, shift,
        CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
        CHUNK: tl.constexpr, XW: tl.constexpr, X_BLOCKS: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr,
        PREFETCH: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr):
    """One program pools a channel block of a query tile; the first block also keeps the norms."""
    BLOCKS: tl.constexpr = 1 if TAIL else (CHANNELS + BLOCK_C - 1) // BLOCK_C
    block, plane, batch, group, y0, x0 = locate(
        tl.program_id(0), BLOCKS, out_height, out_width, groups, TILE_H, TILE_W, XW)
    i = tl.arange(0, TILE_H * TILE_W)
    q_row = y0 + i // TILE_W
    q_col = x0 + i % TILE_W
    m_q = (q_row < out_height) & (q_col < out_width)
    rows = padded(height)
    q_rows = padded(out_height)
    keys = X_BLOCKS * XW * rows
    queries = tl.cdiv(out_width, XW) * XW * q_rows
    p_x += batch * s_xb + group * CHANNELS * s_xc
    p_w = p_kept + plane * kept_size
    p_scale = p_w + 2 * keys
    q_cell = cell(q_row, q_col, q_rows, XW)
    m_cell = q_col < tl.cdiv(out_width, XW) * XW
    scale = tl.load(p_scale + q_cell, mask=m_cell, other=0.0)
    p_radius = p_scale + 3 * queries
    if WHOLE:
        wide = tl.load(p_radius + queries // XW) > 0
        ya = 0
        yb = height
        xa = 0
        xb = X_BLOCKS
    else:
        piece_row, first, last, radius = query_reach(p_radius, y0, x0, out_width, q_rows, TILE_H, TILE_W, XW)
        wide = tl.max(radius, 0) >= WIDE
        ya, yb, xa, xb = key_window(piece_row, first, last, radius, height, width, CHUNK, XW, STRIDE)
    row = center(q_row, STRIDE)
    col = center(q_col, STRIDE)
    least_y = least_square(q_row, height, STRIDE)
    least_x = least_square(q_col, width, STRIDE)
    if wide:
        top = largest_exponent(p_w + keys, scale, row, col, least_y, least_x, ya, yb, xa, xb, rows, CHUNK, XW, STRIDE)
        acc, tail, used = pool_window(
            p_x, p_w + keys, s_xc, s_xh, s_xw, scale, top, shift, row, col, least_y, least_x, ya, yb, xa, xb,
            height, width, rows, block, CHANNELS, BLOCK_C, TAIL, CHUNK, XW, STRIDE, True, PREFETCH, PRECISION, INDEX)
        norm = tl.log2(used) - shift
        if block == 0:
            tl.store(p_scale + 2 * queries + q_cell, top, mask=m_q)
    else:
        acc, tail, used = pool_window(
            p_x, p_w, s_xc, s_xh, s_xw, scale, scale, shift, row, col, least_y, least_x, ya, yb, xa, xb,
            height, width, rows, block, CHANNELS, BLOCK_C, TAIL, CHUNK, XW, STRIDE, False, PREFETCH, PRECISION, INDEX)
        norm = tl.log2(used)
    inverse = 1.0 / used
    p_y += batch * s_yb + group * CHANNELS * s_yc
    at = q_row.to(INDEX) * s_yh + q_col.to(INDEX) * s_yw
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(p_y + at[:, None] + (c.to(INDEX) * s_yc)[None, :], (acc * inverse[:, None]).to(p_y.dtype.element_ty),
             mask=m_q[:, None] & (c < CHANNELS)[None, :])
    if TAIL:
        t = BLOCK_C + tl.arange(0, TAIL)
        tl.store(p_y + at[:, None] + (t.to(INDEX) * s_yc)[None, :], (tail * inverse[:, None]).to(p_y.dtype.element_ty),
                 mask=m_q[:, None] & (t < CHANNELS)[None, :])
    if block == 0:
        tl.store(p_scale + queries + q_cell, norm, mask=m_q)
