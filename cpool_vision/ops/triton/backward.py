"""The backward kernels. Each sums over its own tile in a fixed order, so there are no atomics.

With weights `a_ij` made again from the norm that the forward kept, `S_ij = dy_i . x_j` and `d_i = sum_j a_ij S_ij`:
`dsigma_i = sigma_i^-3 sum_j a_ij D_ij (S_ij - d_i)`, `dl_j = sum_i a_ij (S_ij - d_i)` and `dx_j = sum_i a_ij dy_i`.
"""
import triton
import triton.language as tl

from .common import (
    dot,
    exponent_scale,
    load_logits,
    nearest_pixel,
    offsets,
    reaches,
    reaching_box,
    squared_distances,
    tile_cells,
    weights,
)


@triton.jit
def products(p_grad, b_query, m_query, s_gc, p_x, b_key, m_key, s_xc, first, channels,
             QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr):
    """`(queries, keys)`: `dy_i . x_j` over the channels of a group, in fp32."""
    b_products = tl.zeros((QUERIES, KEYS), tl.float32)
    for start in range(0, channels, BLOCK_C):
        b_c = start + tl.arange(0, BLOCK_C)
        m_c = b_c < channels
        b_g = tl.load(p_grad + b_query[:, None] + (first + b_c)[None, :] * s_gc,
                      mask=m_query[:, None] & m_c[None, :], other=0.0)
        b_v = tl.load(p_x + b_key[None, :] + (first + b_c)[:, None] * s_xc,
                      mask=m_key[None, :] & m_c[:, None], other=0.0)
        b_products = dot(b_g, b_v, b_products)
    return b_products


@triton.jit
def grad_supports(
        p_grad, p_x, p_logits, p_sigma, p_norm, p_reach, p_dot, p_dsigma,
        s_gb, s_gc, s_gh, s_gw, s_xb, s_xc, s_xh, s_xw, s_lb, s_lg, s_lh, s_lw, s_sb, s_sg, s_sh, s_sw,
        height, width, out_height, out_width, groups, channels, stride,
        QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program makes `dsigma_i` and `d_i` of a query tile."""
    tiles_w = tl.cdiv(out_width, QUERY_W)
    tiles = tl.cdiv(out_height, QUERY_H) * tiles_w
    tile = tl.program_id(0) % tiles
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    batch = plane // groups
    group = plane % groups
    p_logits += batch * s_lb + group * s_lg
    p_sigma += batch * s_sb + group * s_sg
    p_grad += batch * s_gb
    p_x += batch * s_xb

    b_row, b_col, m_query = tile_cells(tile, tiles_w, out_height, out_width, QUERY_H, QUERY_W)
    b_y, b_x = nearest_pixel(b_row, b_col, height, width, stride)
    b_cell = plane * out_height * out_width + offsets(b_row, b_col, out_width, 1)
    b_query = offsets(b_row, b_col, s_gh, s_gw)
    b_sigma = tl.load(p_sigma + offsets(b_row, b_col, s_sh, s_sw), mask=m_query, other=1.0).to(tl.float32)
    b_top = tl.load(p_norm + b_cell * 2, mask=m_query, other=0.0)
    b_log = tl.load(p_norm + b_cell * 2 + 1, mask=m_query, other=float('inf'))
    b_scale = exponent_scale(b_sigma)
    p_tile = p_reach + (plane * tiles + tile) * 4
    y0 = tl.load(p_tile)
    y1 = tl.load(p_tile + 1)
    x0 = tl.load(p_tile + 2)
    x1 = tl.load(p_tile + 3)

    b_dot = tl.zeros((QUERY_H * QUERY_W,), tl.float32)
    b_far = tl.zeros((QUERY_H * QUERY_W,), tl.float32)
    b_both = tl.zeros((QUERY_H * QUERY_W,), tl.float32)
    keys_w = tl.cdiv(width, KEY_W)
    for n in range(0, (y1 - y0) * (x1 - x0)):
        key = (y0 + n // (x1 - x0)) * keys_w + x0 + n % (x1 - x0)
        b_ky, b_kx, m_key = tile_cells(key, keys_w, height, width, KEY_H, KEY_W)
        b_products = products(
            p_grad, b_query, m_query, s_gc, p_x, offsets(b_ky, b_kx, s_xh, s_xw), m_key, s_xc,
            group * channels, channels, QUERY_H * QUERY_W, KEY_H * KEY_W, BLOCK_C)
        b_l = load_logits(p_logits, b_ky, b_kx, m_key, s_lh, s_lw)
        b_d = squared_distances(b_row, b_col, b_y, b_x, b_ky, b_kx, stride)
        b_a = weights(b_l[None, :] - b_d * b_scale[:, None], b_top, b_log)
        b_dot += tl.sum(b_a * b_products, 1)
        b_a *= b_d
        b_far += tl.sum(b_a, 1)
        b_both += tl.sum(b_a * b_products, 1)

    tl.store(p_dot + b_cell, b_dot, mask=m_query)
    # One division at a time: the cube of a small support underflows.
    b_dsigma = (b_both - b_dot * b_far) / b_sigma / b_sigma / b_sigma
    tl.store(p_dsigma + b_cell, b_dsigma.to(p_dsigma.dtype.element_ty), mask=m_query)


@triton.jit
def grad_logits(
        p_grad, p_x, p_logits, p_sigma, p_norm, p_reach, p_dot, p_dlogits,
        s_gb, s_gc, s_gh, s_gw, s_xb, s_xc, s_xh, s_xw, s_lb, s_lg, s_lh, s_lw, s_sb, s_sg, s_sh, s_sw,
        height, width, out_height, out_width, groups, channels, stride,
        QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr,
        SEARCH: tl.constexpr):
    """One program makes `dl_j` of a key tile from the query tiles that read it."""
    keys_w = tl.cdiv(width, KEY_W)
    keys = tl.cdiv(height, KEY_H) * keys_w
    key = tl.program_id(0) % keys
    plane = (tl.program_id(0) // keys).to(tl.int64)
    batch = plane // groups
    group = plane % groups
    tiles_w = tl.cdiv(out_width, QUERY_W)
    tiles = tl.cdiv(out_height, QUERY_H) * tiles_w
    p_reach += plane * tiles * 4
    p_sigma += batch * s_sb + group * s_sg
    p_grad += batch * s_gb
    p_x += batch * s_xb

    b_ky, b_kx, m_key = tile_cells(key, keys_w, height, width, KEY_H, KEY_W)
    b_l = load_logits(p_logits + batch * s_lb + group * s_lg, b_ky, b_kx, m_key, s_lh, s_lw)
    b_key = offsets(b_ky, b_kx, s_xh, s_xw)
    b_dlogits = tl.zeros((KEY_H * KEY_W,), tl.float32)
    box_y, box_x, rows, cols = reaching_box(p_reach, tiles, tiles_w, key // keys_w, key % keys_w, SEARCH)
    for n in range(0, rows * cols):
        tile = (box_y + n // cols) * tiles_w + box_x + n % cols
        if reaches(p_reach, tile, tile >= 0, key // keys_w, key % keys_w):
            b_row, b_col, m_query = tile_cells(tile, tiles_w, out_height, out_width, QUERY_H, QUERY_W)
            b_y, b_x = nearest_pixel(b_row, b_col, height, width, stride)
            b_cell = plane * out_height * out_width + offsets(b_row, b_col, out_width, 1)
            b_sigma = tl.load(p_sigma + offsets(b_row, b_col, s_sh, s_sw), mask=m_query, other=1.0).to(tl.float32)
            b_top = tl.load(p_norm + b_cell * 2, mask=m_query, other=0.0)
            b_log = tl.load(p_norm + b_cell * 2 + 1, mask=m_query, other=float('inf'))
            b_dot = tl.load(p_dot + b_cell, mask=m_query, other=0.0)
            b_products = products(
                p_grad, offsets(b_row, b_col, s_gh, s_gw), m_query, s_gc, p_x, b_key, m_key, s_xc,
                group * channels, channels, QUERY_H * QUERY_W, KEY_H * KEY_W, BLOCK_C)
            b_d = squared_distances(b_row, b_col, b_y, b_x, b_ky, b_kx, stride)
            b_a = weights(b_l[None, :] - b_d * exponent_scale(b_sigma)[:, None], b_top, b_log)
            b_dlogits += tl.sum(b_a * (b_products - b_dot[:, None]), 0)
    p_out = p_dlogits + plane * height * width + offsets(b_ky, b_kx, width, 1)
    tl.store(p_out, b_dlogits.to(p_dlogits.dtype.element_ty), mask=m_key)


@triton.jit
def grad_features(
        p_grad, p_dx, p_logits, p_sigma, p_norm, p_reach,
        s_gb, s_gc, s_gh, s_gw, s_xb, s_xc, s_xh, s_xw, s_lb, s_lg, s_lh, s_lw, s_sb, s_sg, s_sh, s_sw,
        height, width, out_height, out_width, groups, channels, stride,
        QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr,
        SEARCH: tl.constexpr, SHIFT: tl.constexpr):
    """One program makes `dx_j` of a channel block of a key tile; weights are scaled by `2^SHIFT` while in `dy`'s dtype.
    """
    keys_w = tl.cdiv(width, KEY_W)
    keys = tl.cdiv(height, KEY_H) * keys_w
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    key = tl.program_id(0) // blocks % keys
    plane = (tl.program_id(0) // blocks // keys).to(tl.int64)
    batch = plane // groups
    group = plane % groups
    tiles_w = tl.cdiv(out_width, QUERY_W)
    tiles = tl.cdiv(out_height, QUERY_H) * tiles_w
    p_reach += plane * tiles * 4
    p_sigma += batch * s_sb + group * s_sg

    b_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < channels
    b_channel = group * channels + b_c
    b_ky, b_kx, m_key = tile_cells(key, keys_w, height, width, KEY_H, KEY_W)
    b_l = load_logits(p_logits + batch * s_lb + group * s_lg, b_ky, b_kx, m_key, s_lh, s_lw)
    b_sum = tl.zeros((KEY_H * KEY_W, BLOCK_C), tl.float32)
    box_y, box_x, rows, cols = reaching_box(p_reach, tiles, tiles_w, key // keys_w, key % keys_w, SEARCH)
    for n in range(0, rows * cols):
        tile = (box_y + n // cols) * tiles_w + box_x + n % cols
        if reaches(p_reach, tile, tile >= 0, key // keys_w, key % keys_w):
            b_row, b_col, m_query = tile_cells(tile, tiles_w, out_height, out_width, QUERY_H, QUERY_W)
            b_y, b_x = nearest_pixel(b_row, b_col, height, width, stride)
            b_cell = plane * out_height * out_width + offsets(b_row, b_col, out_width, 1)
            b_sigma = tl.load(p_sigma + offsets(b_row, b_col, s_sh, s_sw), mask=m_query, other=1.0).to(tl.float32)
            b_top = tl.load(p_norm + b_cell * 2, mask=m_query, other=0.0)
            b_log = tl.load(p_norm + b_cell * 2 + 1, mask=m_query, other=float('inf'))
            b_g = tl.load(
                p_grad + batch * s_gb + offsets(b_row, b_col, s_gh, s_gw)[:, None] + b_channel[None, :] * s_gc,
                mask=m_query[:, None] & m_c[None, :], other=0.0)
            b_d = squared_distances(b_row, b_col, b_y, b_x, b_ky, b_kx, stride)
            b_a = weights(b_l[None, :] - b_d * exponent_scale(b_sigma)[:, None], b_top, b_log - SHIFT)
            b_sum = dot(tl.trans(b_a.to(b_g.dtype)), b_g, b_sum)
    p_out = p_dx + batch * s_xb + offsets(b_ky, b_kx, s_xh, s_xw)[:, None] + b_channel[None, :] * s_xc
    b_out = b_sum * (1.0 / (1 << SHIFT))
    tl.store(p_out, b_out.to(p_dx.dtype.element_ty), mask=m_key[:, None] & m_c[None, :])
