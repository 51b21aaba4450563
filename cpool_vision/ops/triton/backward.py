"""The backward kernels. Each sums over its own tile in a fixed order, so there are no atomics.

With weights `a_ij` made again from the norm that the forward kept, `S_ij = dy_i . x_j` and `d_i = sum_j a_ij S_ij`:
`dsigma_i = sigma_i^-3 sum_j a_ij D_ij (S_ij - d_i)`, `dl_j = sum_i a_ij (S_ij - d_i)` and `dx_j = sum_i a_ij dy_i`.
"""
import triton
import triton.language as tl

from .common import (
    EVERYTHING,
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
from .forward import keys_at


@triton.jit
def fold(a, ROWS: tl.constexpr):
    """Sums `(queries, ROWS * n)` over the rows of a chunk: `(queries, n)`."""
    if ROWS == 1:
        return a
    return tl.sum(tl.reshape(a, (a.shape[0], ROWS, a.shape[1] // ROWS)), 1)


@triton.jit
def keys_of(p_chunk, at, c, m_k, CHANNELS: tl.constexpr, WHOLE_C: tl.constexpr):
    """Features of a chunk's keys, `(channels, keys)`: all of a block's, or those that the group has."""
    if WHOLE_C:
        return tl.load(p_chunk + at, mask=m_k[None, :], other=0.0)
    return tl.load(p_chunk + at, mask=m_k[None, :] & (c < CHANNELS)[:, None], other=0.0)


@triton.jit
def sums_of_queries(
        p_g, p_x, p_w, s_gc, s_xc, s_xh, s_xw, g_at, m_q, scale, norm, top, row, col, least_y, least_x, ya, yb, xa, xb,
        height, width, rows,
        CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, XW: tl.constexpr,
        STRIDE: tl.constexpr, IN_LOGS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr):
    """`sum_j a_ij` times 1, `S_ij`, `D_ij` and `D_ij S_ij`, D less its least, over the keys of a window.

    Per pair it forms the part of a weight that depends on rows and on the key alone, and sums that, and its product
    with `S_ij`, with and without the rows' part of D. The columns' part multiplies sums over all rows of a block.
    """
    QUERIES: tl.constexpr = row.shape[0]
    KEYS: tl.constexpr = CHUNK * XW
    BLOCKS: tl.constexpr = 1 if TAIL else (CHANNELS + BLOCK_C - 1) // BLOCK_C
    WHOLE_C: tl.constexpr = CHANNELS == BLOCK_C or TAIL > 0
    k = tl.arange(0, KEYS)
    kr = k // XW
    kc = k % XW
    x = tl.arange(0, XW)
    c = tl.arange(0, BLOCK_C)
    at = kr.to(INDEX) * s_xh + kc.to(INDEX) * s_xw
    at_c = at[None, :] + (c.to(INDEX) * s_xc)[:, None]
    g_c = g_at[:, None] + (c.to(INDEX) * s_gc)[None, :]
    if BLOCKS == 1:
        g = tl.load(p_g + g_c, mask=m_q[:, None] & (c < CHANNELS)[None, :], other=0.0)
    if TAIL:
        t = BLOCK_C + tl.arange(0, TAIL)
        m_t = t < CHANNELS
        at_t = at[None, :] + (t.to(INDEX) * s_xc)[:, None]
        g_t = tl.load(p_g + g_at[:, None] + (t.to(INDEX) * s_gc)[None, :], mask=m_q[:, None] & m_t[None, :], other=0.0)
    all_a = tl.zeros((QUERIES,), tl.float32)
    all_as = tl.zeros((QUERIES,), tl.float32)
    all_ad = tl.zeros((QUERIES,), tl.float32)
    all_ads = tl.zeros((QUERIES,), tl.float32)
    for b in range(xa, xb):
        wide_dx2 = squares(col[:, None], (b * XW + kc).to(tl.float32)[None, :], least_x[:, None], STRIDE)
        m_x = b * XW + kc < width
        of_a = tl.zeros((QUERIES, XW), tl.float32)
        of_as = tl.zeros((QUERIES, XW), tl.float32)
        of_ad = tl.zeros((QUERIES, XW), tl.float32)
        of_ads = tl.zeros((QUERIES, XW), tl.float32)
        for y in range(ya, yb, CHUNK):
            p_chunk = p_x + offset(y, INDEX) * s_xh + offset(b, INDEX) * (XW * s_xw)
            m_k = m_x & (kr < height - y)
            products = tl.zeros((QUERIES, KEYS), tl.float32)
            if BLOCKS == 1:
                v = keys_of(p_chunk, at_c, c, m_k, CHANNELS, WHOLE_C)
                if TAIL:
                    v_t = tl.load(p_chunk + at_t, mask=m_k[None, :] & m_t[:, None], other=0.0)
                products = dot(g, v, products, PRECISION)
                if TAIL:
                    products = dot(g_t, v_t, products, PRECISION)
            else:
                for n in range(0, BLOCKS):
                    first = offset(n * BLOCK_C, INDEX)
                    if CHANNELS % BLOCK_C == 0:
                        v = tl.load(p_chunk + first * s_xc + at_c, mask=m_k[None, :], other=0.0)
                        g = tl.load(p_g + first * s_gc + g_c, mask=m_q[:, None], other=0.0)
                    else:
                        m_c = n * BLOCK_C + c < CHANNELS
                        v = tl.load(p_chunk + first * s_xc + at_c, mask=m_k[None, :] & m_c[:, None], other=0.0)
                        g = tl.load(p_g + first * s_gc + g_c, mask=m_q[:, None] & m_c[None, :], other=0.0)
                    products = dot(g, v, products, PRECISION)
            w = tl.load(p_w + (b * rows + y) * XW + k)
            dy2 = squares(row[:, None], (y + kr).to(tl.float32)[None, :], least_y[:, None], STRIDE)
            if IN_LOGS:
                a = exponents(w[None, :], scale[:, None], wide_dx2, dy2) - top[:, None]
                a = tl.exp2(a - norm[:, None])
            else:
                a = tl.exp2(-scale[:, None] * dy2 - norm[:, None]) * w[None, :]
            a = follow(a, products)
            far = a * dy2
            of_a += fold(a, CHUNK)
            of_ad += fold(far, CHUNK)
            of_as += fold(a * products, CHUNK)
            of_ads += fold(far * products, CHUNK)
        dx2 = squares(col[:, None], (b * XW + x).to(tl.float32)[None, :], least_x[:, None], STRIDE)
        if not IN_LOGS:
            factor = tl.exp2(-scale[:, None] * dx2)
            of_a *= factor
            of_as *= factor
            of_ad *= factor
            of_ads *= factor
        all_a += tl.sum(of_a, 1)
        all_as += tl.sum(of_as, 1)
        all_ad += tl.sum(of_ad + of_a * dx2, 1)
        all_ads += tl.sum(of_ads + of_as * dx2, 1)
    return all_a, all_as, all_ad, all_ads


@triton.jit
def grad_queries(
        p_g, p_x, p_kept, p_sums, p_sigma, p_dsigma,
        s_gb, s_gc, s_gh, s_gw, s_xb, s_xc, s_xh, s_xw, s_sb, s_sg, s_sh, s_sw,
        height, width, out_height, out_width, groups, shared, kept_size,
        CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
        CHUNK: tl.constexpr, XW: tl.constexpr, X_BLOCKS: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr,
        PRECISION: tl.constexpr, INDEX: tl.constexpr):
    """One program makes `dsigma_i` of a query tile, and keeps `d_i` and the norm of weights that are not rounded."""
    _, plane, batch, group, y0, x0 = locate(tl.program_id(0), 1, out_height, out_width, groups, TILE_H, TILE_W, XW)
    i = tl.arange(0, TILE_H * TILE_W)
    q_row = y0 + i // TILE_W
    q_col = x0 + i % TILE_W
    m_q = (q_row < out_height) & (q_col < out_width)
    rows = padded(height)
    q_rows = padded(out_height)
    keys = X_BLOCKS * XW * rows
    queries = tl.cdiv(out_width, XW) * XW * q_rows
    p_x += batch * s_xb + group * CHANNELS * s_xc
    p_g += batch * s_gb + group * CHANNELS * s_gc
    p_w = p_kept + plane * kept_size
    p_scale = p_w + 2 * keys
    q_cell = cell(q_row, q_col, q_rows, XW)
    m_cell = q_col < tl.cdiv(out_width, XW) * XW
    scale = tl.load(p_scale + q_cell, mask=m_cell, other=0.0)
    norm = tl.load(p_scale + queries + q_cell, mask=m_q, other=0.0)
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
    g_at = q_row.to(INDEX) * s_gh + q_col.to(INDEX) * s_gw
    if wide:
        top = tl.load(p_scale + 2 * queries + q_cell, mask=m_q, other=0.0)
        a, a_s, a_d, a_ds = sums_of_queries(
            p_g, p_x, p_w + keys, s_gc, s_xc, s_xh, s_xw, g_at, m_q, scale, norm, top, row, col, least_y, least_x,
            ya, yb, xa, xb, height, width, rows, CHANNELS, BLOCK_C, TAIL, CHUNK, XW, STRIDE, True, PRECISION, INDEX)
    else:
        a, a_s, a_d, a_ds = sums_of_queries(
            p_g, p_x, p_w, s_gc, s_xc, s_xh, s_xw, g_at, m_q, scale, norm, scale, row, col, least_y, least_x,
            ya, yb, xa, xb, height, width, rows, CHANNELS, BLOCK_C, TAIL, CHUNK, XW, STRIDE, False, PRECISION, INDEX)
    a = tl.where(m_q, a, 1.0)
    inverse = 1.0 / a
    d = a_s * inverse
    p_sums += plane * 2 * queries
    # Padded queries weigh nothing.
    tl.store(p_sums + q_cell, tl.where(m_q, norm + tl.log2(a), float('inf')), mask=m_cell)
    tl.store(p_sums + queries + q_cell, tl.where(m_q, d, 0.0), mask=m_cell)
    p_sigma += batch * s_sb + (group.to(tl.int32) // shared).to(tl.int64) * s_sg
    sigma = tl.load(p_sigma + q_row * s_sh + q_col * s_sw, mask=m_q, other=1.0).to(tl.float32)
    # One division at a time: the cube of a small support underflows.
    dsigma = (a_ds - d * a_d) * inverse / sigma / sigma / sigma
    p_dsigma += (plane * out_height + q_row) * out_width + q_col
    tl.store(p_dsigma, dsigma.to(p_dsigma.dtype.element_ty), mask=m_q)


@triton.jit
def query_rows(p_radius, block, y0, x0, out_height, rows, size,
               TILE_H: tl.constexpr, TILE_W: tl.constexpr, CHUNK: tl.constexpr, XW: tl.constexpr,
               STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """First row (a multiple of CHUNK) and last + 1 of the queries of a block of columns that read a key tile."""
    h = tl.arange(0, ROWS)
    radius = tl.load(p_radius + block * rows + h, mask=h < out_height, other=-EVERYTHING)
    y = center(h, STRIDE)
    right = center(block * XW + XW - 1, STRIDE)
    gap = tl.maximum(tl.maximum(center(block * XW, STRIDE) - (x0 + TILE_W - 1), x0 - right), 0.0)
    reaches = (y + radius >= y0) & (y - radius <= y0 + TILE_H - 1) & (gap <= radius)
    return (tl.min(tl.where(reaches, h, size), 0) // CHUNK * CHUNK, tl.max(tl.where(reaches, h, -1), 0) + 1)


@triton.jit
def sums_of_keys(
        p_g, p_scale, p_sums, p_top, s_gc, s_gh, s_gw, x, w, log_w, k_row, k_col, y0, x0, block,
        height, width, out_height, out_width, q_rows, queries,
        CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
        CHUNK: tl.constexpr, XW: tl.constexpr, Q_BLOCKS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
        STRIDE: tl.constexpr, IN_LOGS: tl.constexpr, SHIFT: tl.constexpr, PREFETCH: tl.constexpr,
        PRECISION: tl.constexpr, INDEX: tl.constexpr):
    """`dx_j` of a block of channels, and `dl_j`, over the queries that read a key tile.

    Weights are formed without the key's own, which multiplies the sums; or, IN_LOGS, from logarithms. For fp16, whose
    range is small, they are formed whole and `2^SHIFT` times as large.
    """
    KEYS: tl.constexpr = TILE_H * TILE_W
    QUERIES: tl.constexpr = CHUNK * XW
    WHOLE_C: tl.constexpr = CHANNELS % BLOCK_C == 0
    dtype = p_g.dtype.element_ty
    q = tl.arange(0, QUERIES)
    qr = q // XW
    qc = q % XW
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = qr.to(INDEX) * s_gh + qc.to(INDEX) * s_gw
    at_c = at[:, None] + (c.to(INDEX) * s_gc)[None, :]
    dx = tl.zeros((KEYS, BLOCK_C), tl.float32)
    dlogits = tl.zeros((KEYS, QUERIES), tl.float32)
    for b in range(0, Q_BLOCKS):
        if WHOLE:
            ya = 0
            yb = out_height
        else:
            ya, yb = query_rows(p_scale + 3 * queries, b, y0, x0, out_height, q_rows, ROWS,
                                TILE_H, TILE_W, CHUNK, XW, STRIDE, ROWS)
        m_x = b * XW + qc < out_width
        dx2 = squares(center(b * XW + qc, STRIDE)[None, :], k_col[:, None].to(tl.float32),
                      least_square(b * XW + qc, width, STRIDE)[None, :], STRIDE)
        p_block = p_g + offset(b, INDEX) * (XW * s_gw)
        if PREFETCH:
            n = (b * q_rows + ya) * XW + q
            next_g = keys_at(p_block + offset(ya, INDEX) * s_gh, at_c, c, m_x & (qr < out_height - ya),
                             CHANNELS, WHOLE_C)
            next_scale = tl.load(p_scale + n)
            next_norm = tl.load(p_sums + n)
            next_d = tl.load(p_sums + queries + n)
        for y in range(ya, yb, CHUNK):
            n = (b * q_rows + y) * XW + q
            if PREFETCH:
                g = next_g
                scale = next_scale
                norm = next_norm
                d = next_d
                # Past the last row nothing is read; what is kept of queries is padded.
                after = y + CHUNK
                next_n = (b * q_rows + tl.minimum(after, q_rows - CHUNK)) * XW + q
                next_g = keys_at(p_block + offset(after, INDEX) * s_gh, at_c, c, m_x & (qr < out_height - after),
                                 CHANNELS, WHOLE_C)
                next_scale = tl.load(p_scale + next_n)
                next_norm = tl.load(p_sums + next_n)
                next_d = tl.load(p_sums + queries + next_n)
            else:
                g = keys_at(p_block + offset(y, INDEX) * s_gh, at_c, c, m_x & (qr < out_height - y), CHANNELS, WHOLE_C)
                scale = tl.load(p_scale + n)
                norm = tl.load(p_sums + n)
            dy2 = squares(center(y + qr, STRIDE)[None, :], k_row[:, None].to(tl.float32),
                          least_square(y + qr, height, STRIDE)[None, :], STRIDE)
            if IN_LOGS:
                a = exponents(log_w[:, None], scale[None, :], dx2, dy2) - tl.load(p_top + n)[None, :]
                a = tl.exp2(a - (norm[None, :] - SHIFT))
            else:
                a = tl.exp2(exponents(-norm[None, :], scale[None, :], dy2, dx2))
                if SHIFT:
                    a *= (w * (1 << SHIFT))[:, None]
            products = dot(x, tl.trans(g), tl.zeros((KEYS, QUERIES), tl.float32), PRECISION)
            a = follow(a, products)
            if block == 0:
                if not PREFETCH:
                    d = tl.load(p_sums + queries + n)
                products -= d[None, :]
            dlogits += a * products
            dx = dot(a.to(dtype), g, dx, PRECISION)
    if SHIFT:
        rest = tl.full((KEYS,), 1.0 / (1 << SHIFT), tl.float32)
    elif IN_LOGS:
        rest = tl.full((KEYS,), 1.0, tl.float32)
    else:
        rest = w
    return dx * rest[:, None], tl.sum(dlogits, 1) * rest


@triton.jit
def grad_keys(
        p_g, p_x, p_dx, p_kept, p_sums, p_dlogits,
        s_gb, s_gc, s_gh, s_gw, s_xb, s_xc, s_xh, s_xw, s_db, s_dc, s_dh, s_dw,
        height, width, out_height, out_width, groups, kept_size, planes,
        CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
        CHUNK: tl.constexpr, XW: tl.constexpr, X_BLOCKS: tl.constexpr, Q_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
        WHOLE: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, PREFETCH: tl.constexpr,
        PRECISION: tl.constexpr, INDEX: tl.constexpr):
    """One program makes `dx_j` of a channel block of a key tile, and that block's part of `dl_j`."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    block, plane, batch, group, y0, x0 = locate(
        tl.program_id(0), BLOCKS, height, width, groups, TILE_H, TILE_W, XW)
    i = tl.arange(0, TILE_H * TILE_W)
    k_row = y0 + i // TILE_W
    k_col = x0 + i % TILE_W
    m_k = (k_row < height) & (k_col < width)
    rows = padded(height)
    q_rows = padded(out_height)
    keys = X_BLOCKS * XW * rows
    queries = Q_BLOCKS * XW * q_rows
    p_x += batch * s_xb + group * CHANNELS * s_xc
    p_g += batch * s_gb + group * CHANNELS * s_gc
    p_dx += batch * s_db + group * CHANNELS * s_dc
    p_kept += plane * kept_size
    p_scale = p_kept + 2 * keys
    p_sums += plane * 2 * queries
    k_cell = cell(k_row, k_col, rows, XW)
    w = tl.load(p_kept + k_cell, mask=m_k, other=0.0)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = m_k[:, None] & (c < CHANNELS)[None, :]
    x_at = k_row.to(INDEX) * s_xh + k_col.to(INDEX) * s_xw
    x = tl.load(p_x + x_at[:, None] + (c.to(INDEX) * s_xc)[None, :], mask=m_c, other=0.0)
    # The flag lies after the radii of rows of blocks.
    if tl.load(p_scale + 3 * queries + Q_BLOCKS * q_rows) > 0:
        log_w = tl.load(p_kept + keys + k_cell, mask=m_k, other=-float('inf'))
        dx, dlogits = sums_of_keys(
            p_g, p_scale, p_sums, p_scale + 2 * queries, s_gc, s_gh, s_gw, x, w, log_w, k_row, k_col, y0, x0,
            block, height, width, out_height, out_width, q_rows, queries, CHANNELS, BLOCK_C, TILE_H, TILE_W,
            CHUNK, XW, Q_BLOCKS, ROWS, WHOLE, STRIDE, True, SHIFT, PREFETCH, PRECISION, INDEX)
    else:
        dx, dlogits = sums_of_keys(
            p_g, p_scale, p_sums, p_scale, s_gc, s_gh, s_gw, x, w, w, k_row, k_col, y0, x0,
            block, height, width, out_height, out_width, q_rows, queries, CHANNELS, BLOCK_C, TILE_H, TILE_W,
            CHUNK, XW, Q_BLOCKS, ROWS, WHOLE, STRIDE, False, SHIFT, PREFETCH, PRECISION, INDEX)
    d_at = k_row.to(INDEX) * s_dh + k_col.to(INDEX) * s_dw
    tl.store(p_dx + d_at[:, None] + (c.to(INDEX) * s_dc)[None, :], dx.to(p_dx.dtype.element_ty), mask=m_c)
    p_dlogits += (block * planes + plane) * height * width + k_row * width + k_col
    tl.store(p_dlogits, dlogits.to(p_dlogits.dtype.element_ty), mask=m_k)
