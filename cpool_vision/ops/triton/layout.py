"""Where the kernels keep what they make of logits and supports. Torch only: the operator's fake needs it too.

Every map of keys or queries is kept in blocks of 8 or 16 columns, `[block][row][column]`, padded, so that a chunk of a
few rows of one block is contiguous and loops read it without masks.
"""
from typing import NamedTuple

# Rows are padded to a multiple of it: no tile and no chunk has more.
ROWS = 16


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below `n`."""
    return -(-n // multiple) * multiple


def block_width(width: int) -> int:
    """Columns of a block of a map so wide."""
    return 8 if round_up(width, 8) < round_up(width, 16) else 16


class Kept(NamedTuple):
    """Offsets in elements of what is kept of a plane, an image's group: fp32, for the backward pass.

    `w`: weights `exp(l - max l)` of the keys, `2^15` times that for fp16 features. `log_w`: log2 of them. `scale`:
    `log2 e / (2 sigma^2)` of the queries. `norm`: log2 of the sum of their weights, relative to `2^top`. `top`: 0, or
    the largest exponent of a query whose own pixel weighs too little for sums relative to the map's largest logit.
    `radius`: how far the queries of a row of a block read. `wide`: whether `top` of any query may not be 0.
    """
    w: int
    log_w: int
    scale: int
    norm: int
    top: int
    radius: int
    wide: int
    size: int

    @classmethod
    def of(cls, height: int, width: int, out_height: int, out_width: int) -> 'Kept':
        block = block_width(width)
        keys = round_up(height, ROWS) * round_up(width, block)
        queries = round_up(out_height, ROWS) * round_up(out_width, block)
        scale, radius = 2 * keys, 2 * keys + 3 * queries
        wide = radius + queries // block
        # A multiple of 16, which lets compilers load several elements at once.
        return cls(0, keys, scale, scale + queries, scale + 2 * queries, radius, wide, round_up(wide + 1, 16))
