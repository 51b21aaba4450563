"""Maps in the memory layout of their input, and matrix products that write to either layout."""
from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor, groups: int) -> bool:
    """Whether `(B, C, H, W)` maps keep the channels of a pixel together and stay whole under `groups`."""
    return groups == 1 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def empty_maps(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized `(B, C, H, W)` maps on the device of `like`."""
    b, c, h, w = shape
    if channels_last:
        # Not a permuted view: callers may change the maps in place, which autograd refuses for views made here.
        return like.new_empty_strided((b, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype)
    return like.new_empty((b, c, h, w), dtype=dtype)


def accumulate_matmul(out: Tensor, a: Tensor, b: Tensor, channels_last: bool, beta: int = 1) -> None:
    """`out = beta * out + a @ b` in place; beta 0 ignores what `out` held."""
    if channels_last:
        out.transpose(1, 2).baddbmm_(b.transpose(1, 2), a.transpose(1, 2), beta=beta)
    else:
        out.baddbmm_(a, b, beta=beta)
