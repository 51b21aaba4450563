"""What the kernels share: products, offsets, and which keys a tile of queries reads.

Names: `p_` pointers, `s_` strides in elements, `m_` masks. A tile is the patch of cells that a program owns, a chunk
the rows of one block of columns (see `layout`) that an iteration of its loop reads.
"""
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# What is left of it in fp32.
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
# Radius of a query that reads the whole map, and of one whose own pixel weighs too little for sums of weights in fp32.
EVERYTHING = tl.constexpr(1e6)
WIDE = tl.constexpr(2e6)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in fp32."""
    if INTERPRETED:
        # The interpreter holds bf16 as integers and multiplies those; products in fp32 are the same.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision='ieee')
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def follow(a, like):
    """`a`, formed in the layout of `like`, a product: where the compiler would choose another, and convert."""
    if INTERPRETED:
        return a
    return tl.inline_asm_elementwise('mov.f32 $0, $1;', '=f,f,f', [a, like], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def locate(pid, BLOCKS: tl.constexpr, height, width, groups, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
           XW: tl.constexpr):
    """Channel block, plane, image, group, first row and column of a program's tile; tiles cover the padded columns."""
    tiles_w = tl.cdiv(tl.cdiv(width, XW) * XW, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_w
    tile = pid // BLOCKS % tiles
    plane = pid // BLOCKS // tiles
    # Divided in 32 bits, multiplied by strides in 64.
    batch = (plane // groups).to(tl.int64)
    group = (plane % groups).to(tl.int64)
    return pid % BLOCKS, plane.to(tl.int64), batch, group, tile // tiles_w * TILE_H, tile % tiles_w * TILE_W


@triton.jit
def padded(rows):
    """Rows of a kept map."""
    return tl.cdiv(rows, 16) * 16


@triton.jit
def cell(row, col, rows, XW: tl.constexpr):
    """Where a kept map holds a cell."""
    return (col // XW * rows + row) * XW + col % XW


@triton.jit
def offset(i, INDEX: tl.constexpr):
    """A scalar as an index."""
    return tl.zeros((), INDEX) + i


@triton.jit
def center(index, STRIDE: tl.constexpr):
    """Center of an output row or column, in pixels."""
    if STRIDE == 1:
        return index * 1.0
    return index * (STRIDE * 1.0) + (STRIDE - 1) * 0.5


@triton.jit
def nearest(index, size, STRIDE: tl.constexpr):
    """Row or column of the pixel nearest to an output cell's center, the first where two are."""
    return tl.minimum(index * STRIDE + (STRIDE - 1) // 2, size - 1)


@triton.jit
def least_square(index, size, STRIDE: tl.constexpr):
    """Squared offset of the pixel nearest to an output cell's center, along one axis."""
    away = nearest(index, size, STRIDE) * 1.0 - center(index, STRIDE)
    return away * away


@triton.jit
def squares(query, key, least, STRIDE: tl.constexpr):
    """`(len(query), len(key))`: squared offsets along one axis less a query's least; `query`, `key` broadcast."""
    offset = query - key
    if STRIDE == 1:
        return offset * offset
    return offset * offset - least


@triton.jit
def query_reach(p_radius, y0, x0, out_width, rows, TILE_H: tl.constexpr, TILE_W: tl.constexpr, XW: tl.constexpr):
    """Radii of the pieces of a query tile, with their rows and first and last columns."""
    PIECES: tl.constexpr = (TILE_W + XW - 1) // XW
    i = tl.arange(0, TILE_H * PIECES)
    row = y0 + i // PIECES
    block = x0 // XW + i % PIECES
    radius = tl.load(p_radius + block * rows + row, mask=block < tl.cdiv(out_width, XW), other=-EVERYTHING)
    return row, tl.maximum(block * XW, x0), tl.minimum(block * XW + XW, x0 + TILE_W) - 1, radius


@triton.jit
def key_window(row, first, last, radius, height, width, CHUNK: tl.constexpr, XW: tl.constexpr, STRIDE: tl.constexpr):
    """First row (a multiple of CHUNK) and last + 1, first and last + 1 block of columns that a query tile reads."""
    # Of pieces outside the map the radius is so negative that they never decide.
    y = center(row, STRIDE)
    ya = tl.min(tl.where(radius >= 0, y - radius, EVERYTHING), 0)
    yb = tl.max(y + radius, 0)
    xa = tl.min(tl.where(radius >= 0, center(first, STRIDE) - radius, EVERYTHING), 0)
    xb = tl.max(center(last, STRIDE) + radius, 0)
    ya = tl.minimum(tl.maximum(ya, 0.0), height * 1.0).to(tl.int32) // CHUNK * CHUNK
    yb = tl.minimum(tl.maximum(yb, -1.0), height - 1.0).to(tl.int32) + 1
    xa = tl.minimum(tl.maximum(xa, 0.0), width * 1.0).to(tl.int32) // XW
    xb = tl.minimum(tl.maximum(xb, -XW * 1.0), width - 1.0).to(tl.int32) // XW + 1
    return ya, yb, xa, xb


@triton.jit
def exponents(log_w, scale, dx2, dy2):
    """log2 of the weights of pairs, rounded alike wherever it is formed, so that the largest cancels exactly."""
    return tl.fma(-scale, dy2, tl.fma(-scale, dx2, log_w))
