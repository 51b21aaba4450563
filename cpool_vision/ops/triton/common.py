"""What the kernels share: tiles of queries and keys, pair logits, and which query tiles read a key tile.

Names: `p_` pointers, `b_` blocks of values, `m_` masks, `s_` strides in elements. A tile is a 2D patch, so that
it reads only its neighbourhood.
"""
import triton
import triton.language as tl
from triton import knobs

# Pixels of a key tile.
KEY_TILE = (4, 8)
# Query tiles whose reach is looked at together.
SEARCH = 128

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.0e38)
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(b_left, b_right, b_sum):
    """`b_sum + b_left @ b_right` with exact products and sums in fp32."""
    if INTERPRETED:
        # The interpreter holds bf16 as integers and multiplies those; products in fp32 are the same.
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), b_sum, input_precision='ieee')
    return tl.dot(b_left, b_right, b_sum, input_precision='ieee')


@triton.jit
def tile_cells(tile, tiles_w, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows, columns and validity of the cells of a tile."""
    i = tl.arange(0, TILE_H * TILE_W)
    b_row = (tile // tiles_w) * TILE_H + i // TILE_W
    b_col = (tile % tiles_w) * TILE_W + i % TILE_W
    return b_row, b_col, (b_row < height) & (b_col < width)


@triton.jit
def offsets(b_row, b_col, s_h, s_w):
    """64-bit element offsets of cells."""
    return b_row.to(tl.int64) * s_h + b_col.to(tl.int64) * s_w


@triton.jit
def nearest_pixel(b_row, b_col, height, width, stride):
    """The pixel nearest to a cell's centre: the first of them where several are."""
    b_y = tl.minimum(b_row * stride + (stride - 1) // 2, height - 1)
    b_x = tl.minimum(b_col * stride + (stride - 1) // 2, width - 1)
    return b_y, b_x


@triton.jit
def squared_distances(b_row, b_col, b_y, b_x, b_ky, b_kx, stride):
    """`(queries, keys)`: squared distances in pixels, less each query's smallest, so that its nearest pixel has 0."""
    b_cy = b_row * stride + (stride - 1) * 0.5
    b_cx = b_col * stride + (stride - 1) * 0.5
    b_near = (b_y - b_cy) * (b_y - b_cy) + (b_x - b_cx) * (b_x - b_cx)
    b_dy = b_cy[:, None] - b_ky[None, :]
    b_dx = b_cx[:, None] - b_kx[None, :]
    return b_dy * b_dy + b_dx * b_dx - b_near[:, None]


@triton.jit
def exponent_scale(b_sigma):
    """`1 / (2 sigma^2)`, finite for the smallest supports, NaN for NaN."""
    b_inverse = 1.0 / b_sigma
    b_scale = 0.5 * b_inverse * b_inverse
    return tl.where(b_scale > LARGEST, LARGEST, b_scale)


@triton.jit
def load_logits(p_logits, b_ky, b_kx, m_key, s_h, s_w):
    """Logits of pixels, -inf outside the map."""
    return tl.load(p_logits + offsets(b_ky, b_kx, s_h, s_w), mask=m_key, other=-float('inf')).to(tl.float32)


@triton.jit
def weights(b_exponent, b_top, b_log):
    """`a_ij` of exponents, given each query's largest and log2 of the sum of the others relative to it.

    The difference is formed first: exponents may be so large that their sum with a logarithm rounds badly.
    """
    return tl.exp2((b_exponent - b_top[:, None]) * LOG2E - b_log[:, None])


@triton.jit
def query_reach(b_row, b_col, m_query, b_y, b_x, b_sigma, b_own, height, width, stride, log_tolerance,
                KEY_H: tl.constexpr, KEY_W: tl.constexpr):
    """First and last + 1 key tile, by row and by column, that the queries of a tile must read.

    What query i leaves out is beyond its radius along one axis. Relative to the nearest pixel, whose logit lies `own`
    below the map's largest, the four sides weigh at most `4 (1 + sigma / 5) (1 + sqrt(2 pi) sigma) exp(own - L)` at the
    radius `sqrt(near + 2 sigma^2 L)`, `near` being the nearest pixel's squared distance: a Gaussian sum over integers
    is at most its integral plus its largest term, and L > 12.5. The radius makes this the tolerance.
    """
    b_cy = b_row * stride + (stride - 1) * 0.5
    b_cx = b_col * stride + (stride - 1) * 0.5
    b_near = (b_y - b_cy) * (b_y - b_cy) + (b_x - b_cx) * (b_x - b_cx)
    b_log = tl.log(4.0 * (1.0 + 0.2 * b_sigma) * (1.0 + 2.5066283 * b_sigma)) + b_own - log_tolerance
    b_radius = tl.sqrt(b_near + 2.0 * b_sigma * b_sigma * b_log)
    # Also where the radius is not a number: the query reads everything.
    whole = (height + width + stride) * 1.0
    b_radius = tl.where(b_radius < whole, b_radius, whole)
    y0 = tl.min(tl.where(m_query, tl.maximum(b_cy - b_radius, 0.0), whole), 0).to(tl.int32) // KEY_H
    x0 = tl.min(tl.where(m_query, tl.maximum(b_cx - b_radius, 0.0), whole), 0).to(tl.int32) // KEY_W
    y1 = tl.max(tl.where(m_query, tl.minimum(b_cy + b_radius, height - 1.0), 0.0), 0).to(tl.int32) // KEY_H + 1
    x1 = tl.max(tl.where(m_query, tl.minimum(b_cx + b_radius, width - 1.0), 0.0), 0).to(tl.int32) // KEY_W + 1
    return y0, y1, x0, x1


@triton.jit
def reaches(p_reach, b_tile, m_tile, key_y, key_x):
    """Whether query tiles read the key tile, by the table `(query tiles, 4)` that the forward pass kept."""
    b_y0 = tl.load(p_reach + b_tile * 4, mask=m_tile, other=1)
    b_y1 = tl.load(p_reach + b_tile * 4 + 1, mask=m_tile, other=0)
    b_x0 = tl.load(p_reach + b_tile * 4 + 2, mask=m_tile, other=1)
    b_x1 = tl.load(p_reach + b_tile * 4 + 3, mask=m_tile, other=0)
    return m_tile & (b_y0 <= key_y) & (key_y < b_y1) & (b_x0 <= key_x) & (key_x < b_x1)


@triton.jit
def reaching_box(p_reach, tiles, tiles_w, key_y, key_x, SEARCH: tl.constexpr):
    """First row, first column, rows and columns of the box of query tiles outside which none reads the key tile."""
    b_y0 = tl.full((SEARCH,), 2147483647, tl.int32)
    b_x0 = tl.full((SEARCH,), 2147483647, tl.int32)
    b_y1 = tl.zeros((SEARCH,), tl.int32)
    b_x1 = tl.zeros((SEARCH,), tl.int32)
    for start in range(0, tiles, SEARCH):
        b_tile = start + tl.arange(0, SEARCH)
        m_reach = reaches(p_reach, b_tile, b_tile < tiles, key_y, key_x)
        b_y = b_tile // tiles_w
        b_x = b_tile % tiles_w
        b_y0 = tl.where(m_reach, tl.minimum(b_y0, b_y), b_y0)
        b_x0 = tl.where(m_reach, tl.minimum(b_x0, b_x), b_x0)
        b_y1 = tl.where(m_reach, tl.maximum(b_y1, b_y + 1), b_y1)
        b_x1 = tl.where(m_reach, tl.maximum(b_x1, b_x + 1), b_x1)
    y0 = tl.min(b_y0, 0)
    x0 = tl.min(b_x0, 0)
    y1 = tl.max(b_y1, 0)
    x1 = tl.max(b_x1, 0)
    # Nobody reads it: an empty box.
    return tl.where(y1 > 0, y0, 0), tl.where(x1 > 0, x0, 0), tl.where(y1 > 0, y1 - y0, 0), tl.where(x1 > 0, x1 - x0, 0)
