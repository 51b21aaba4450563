"""Lower bound of the time of a call: the bytes it must move and the FLOPs it must do, at this machine's peak rates.

Bytes: every input and output is read or written once per pass. FLOPs: for each query, the fewest pairs that contain all
but the tolerated share of its weight; an implementation that skips more pairs is wrong.
"""
import functools
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from cpool_vision.ops import TOLERANCE

from .cases import Case, Inputs
from .measure import timer_for

# Number of pairs to count; for larger calls, a random sample of the queries is used.
_SAMPLED_PAIRS = 8_000_000
_CHUNK_PAIRS = 1_000_000
_RATE_SECONDS = 0.3
_MIN_RATE_RUNS, _MAX_RATE_RUNS = 10, 100
# Smallest copies; on a GPU, smaller ones would measure the launch.
_MIN_COPY = {'cpu': 2 ** 20, 'cuda': 2 ** 27}
# Large enough for full speed; on a CPU also short enough to finish without an interruption.
_GEMM_SIDE = {'cpu': 512, 'cuda': 8192}


def needed_pairs(case: Case, inputs: Inputs, seed: int = 0) -> float:
    """Returns how many pixels an output cell must read, averaged over the cells.

    This is the smallest number of pixels that contain all of the cell's weight except the tolerated share,
    `cpool_vision.ops.TOLERANCE` of the features' dtype. For large calls it is estimated from a sample of the cells.
    """
    _, logits, sigma = inputs
    h, w = case.shape[2:]
    ho, wo = case.out_size
    count = max(1, min(sigma.numel(), _SAMPLED_PAIRS // (h * w)))
    chosen = torch.randperm(sigma.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    skipped = 0
    for part in chosen.split(max(1, _CHUNK_PAIRS // (h * w))):
        part = part.to(sigma.device)
        maps, cells = part // (ho * wo), part % (ho * wo)
        rows = _squared_offsets(cells // wo, h, case.stride)
        cols = _squared_offsets(cells % wo, w, case.stride)
        distance = (rows[:, :, None] + cols[:, None, :]).flatten(1)
        scale = sigma.double().flatten()[part, None].square().mul(2)
        weights = (logits.double().flatten(0, 1).flatten(1)[maps] - distance / scale).softmax(-1)
        # Summed in ascending order, so that the small sum of the skipped weights is accurate.
        left_out = weights.sort(-1).values.cumsum(-1) <= TOLERANCE[case.torch_dtype]
        skipped += int(left_out.sum())
    return h * w - skipped / count


def _squared_offsets(cells: Tensor, size: int, stride: int) -> Tensor:
    center = cells.double() * stride + (stride - 1) / 2
    return (center[:, None] - torch.arange(size, device=cells.device, dtype=torch.float64)).square()


def moved_bytes(case: Case, inputs: Inputs) -> int:
    """Returns the bytes of all tensors that a call reads or writes, each once per pass."""
    x, *maps = (t.numel() * t.element_size() for t in inputs)
    cells = case.out_size[0] * case.out_size[1]
    y = case.shape[0] * case.shape[1] * cells * inputs[0].element_size()
    forward = x + sum(maps) + y
    return forward + (y + 2 * (x + sum(maps)) if case.backward else 0)


def multiplied_flops(case: Case, pairs: float) -> float:
    """Returns the FLOPs of the matrix products over the needed pairs: one forward, two more backward."""
    cells = case.out_size[0] * case.out_size[1]
    return 2.0 * case.shape[0] * case.shape[1] * cells * pairs * (3 if case.backward else 1)


def _best_time(call: Callable[[], object], device: torch.device) -> float:
    timer = timer_for(device)
    timer(call)()
    best, spent = float('inf'), 0.0
    for run in range(_MAX_RATE_RUNS):
        if run >= _MIN_RATE_RUNS and spent > _RATE_SECONDS:
            break
        seconds = timer(call)()
        best, spent = min(best, seconds), spent + seconds
    return best


def copy_bandwidth(device: str, size: int) -> float:
    """Returns the bytes read and written per second in the fastest of several copies that move `size` bytes.

    If the tensors of a call fit the processor's cache, this is the speed of the cache.
    """
    where = torch.device(device)
    source = torch.zeros(max(size, _MIN_COPY[where.type]) // 2, dtype=torch.int8, device=where)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _best_time(functools.partial(target.copy_, source), where)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Returns the FLOPs per second in the fastest of several large matrix products of `dtype`, or of fp32 if faster."""
    where = torch.device(device)
    side, best = _GEMM_SIDE[where.type], 0.0
    for each in {dtype, torch.promote_types(dtype, torch.float32)}:
        a = torch.randn(side, side, device=where).to(each)
        out = torch.empty_like(a)
        best = max(best, 2 * side ** 3 / _best_time(functools.partial(torch.mm, a, a, out=out), where))
    return best


class Floor(TypedDict):
    """Lower bound of the time of a call, and what it is computed from.

    Attributes:
        pairs_per_cell: See `needed_pairs`.
        bytes: Bytes to move.
        flops: FLOPs to do.
        copy_bytes_per_s: Measured memory bandwidth.
        gemm_flops_per_s: Measured rate of matrix products.
        ms: The larger of the times for `bytes` and `flops`, in milliseconds.
        bound: Which of the two it is: `memory` or `arithmetic`.
    """

    pairs_per_cell: float
    bytes: int
    flops: float
    copy_bytes_per_s: float
    gemm_flops_per_s: float
    ms: float
    bound: str


def floor(case: Case, inputs: Inputs) -> Floor:
    """Computes the shortest time in which this machine could do a call."""
    pairs = needed_pairs(case, inputs)
    size, flops = moved_bytes(case, inputs), multiplied_flops(case, pairs)
    bandwidth, rate = copy_bandwidth(case.device, size), gemm_rate(case.device, case.torch_dtype)
    return {
        'pairs_per_cell': pairs,
        'bytes': size,
        'flops': flops,
        'copy_bytes_per_s': bandwidth,
        'gemm_flops_per_s': rate,
        'ms': max(size / bandwidth, flops / rate) * 1e3,
        'bound': 'memory' if size / bandwidth > flops / rate else 'arithmetic',
    }
