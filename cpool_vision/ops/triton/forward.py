"""The forward kernel: a tile of queries passes over the key tiles in reach with a running softmax."""
import triton
import triton.language as tl

from .common import (
    LOG2E,
    dot,
    exponent_scale,
    load_logits,
    nearest_pixel,
    offsets,
    query_reach,
    squared_distances,
    tile_cells,
)


@triton.jit
def pool_forward(
        p_x, p_logits, p_sigma, p_peak, p_y, p_norm, p_reach,
        s_xb, s_xc, s_xh, s_xw, s_yb, s_yc, s_yh, s_yw, s_lb, s_lg, s_lh, s_lw, s_sb, s_sg, s_sh, s_sw,
        height, width, out_height, out_width, groups, channels, stride, log_tolerance,
        QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program pools a channel block of a query tile; the first block also keeps the tile's norms and reach."""
    tiles_w = tl.cdiv(out_width, QUERY_W)
    tiles = tl.cdiv(out_height, QUERY_H) * tiles_w
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks % tiles
    plane = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    batch = plane // groups
    group = plane % groups

    b_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < channels
    b_channel = group * channels + b_c
    p_logits += batch * s_lb + group * s_lg
    p_sigma += batch * s_sb + group * s_sg
    peak = tl.load(p_peak + plane)

    b_row, b_col, m_query = tile_cells(tile, tiles_w, out_height, out_width, QUERY_H, QUERY_W)
    b_y, b_x = nearest_pixel(b_row, b_col, height, width, stride)
    b_sigma = tl.load(p_sigma + offsets(b_row, b_col, s_sh, s_sw), mask=m_query, other=1.0).to(tl.float32)
    b_own = peak - tl.load(p_logits + offsets(b_y, b_x, s_lh, s_lw), mask=m_query, other=0.0).to(tl.float32)
    y0, y1, x0, x1 = query_reach(
        b_row, b_col, m_query, b_y, b_x, b_sigma, b_own, height, width, stride, log_tolerance, KEY_H, KEY_W)
    b_scale = exponent_scale(b_sigma)

    b_top = tl.full((QUERY_H * QUERY_W,), -float('inf'), tl.float32)
    b_total = tl.zeros((QUERY_H * QUERY_W,), tl.float32)
    b_used = tl.zeros((QUERY_H * QUERY_W,), tl.float32)
    b_sum = tl.zeros((QUERY_H * QUERY_W, BLOCK_C), tl.float32)
    keys_w = tl.cdiv(width, KEY_W)
    for n in range(0, (y1 - y0) * (x1 - x0)):
        key = (y0 + n // (x1 - x0)) * keys_w + x0 + n % (x1 - x0)
        b_ky, b_kx, m_key = tile_cells(key, keys_w, height, width, KEY_H, KEY_W)
        b_l = load_logits(p_logits, b_ky, b_kx, m_key, s_lh, s_lw)
        b_d = squared_distances(b_row, b_col, b_y, b_x, b_ky, b_kx, stride)
        b_s = b_l[None, :] - b_d * b_scale[:, None]
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        # Nothing but -inf so far: any finite number in its place gives weights of 0.
        b_base = tl.where(b_new == -float('inf'), 0.0, b_new)
        b_p = tl.exp2((b_s - b_base[:, None]) * LOG2E)
        b_shrink = tl.exp2((b_top - b_base) * LOG2E)
        b_v = tl.load(
            p_x + batch * s_xb + offsets(b_ky, b_kx, s_xh, s_xw)[:, None] + b_channel[None, :] * s_xc,
            mask=m_key[:, None] & m_c[None, :], other=0.0)
        b_w = b_p.to(b_v.dtype)
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        # Weights are divided by their sum as rounded, so that constants are preserved in half precision too.
        b_used = b_used * b_shrink + tl.sum(b_w.to(tl.float32), 1)
        b_sum = dot(b_w, b_v, b_sum * b_shrink[:, None])
        b_top = b_new

    p_out = p_y + batch * s_yb + offsets(b_row, b_col, s_yh, s_yw)[:, None] + b_channel[None, :] * s_yc
    b_out = b_sum / b_used[:, None]
    tl.store(p_out, b_out.to(p_y.dtype.element_ty), mask=m_query[:, None] & m_c[None, :])
    if block == 0:
        b_cell = plane * out_height * out_width + offsets(b_row, b_col, out_width, 1)
        tl.store(p_norm + b_cell * 2, b_top, mask=m_query)
        tl.store(p_norm + b_cell * 2 + 1, tl.log2(b_total), mask=m_query)
        p_tile = p_reach + (plane * tiles + tile) * 4
        tl.store(p_tile, y0)
        tl.store(p_tile + 1, y1)
        tl.store(p_tile + 2, x0)
        tl.store(p_tile + 3, x1)
