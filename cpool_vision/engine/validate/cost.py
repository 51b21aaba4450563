"""What a model costs: parameters, multiply-adds, time and memory."""
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from ..device import Precision
from .evaluate import first_output

_RUNS = 200
_LIMIT_S = 20.  # a model that takes longer for all runs gets fewer


def count_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiply-adds of one forward pass: half the operations that `FlopCounterMode` counts.

    A context pool counts as if each output cell read the whole map; attention as its matrix products.

    Args:
        model: not compiled or scripted.
        image: `(1, C, H, W)`.
    """
    switched = [module for module in model.modules() if getattr(module, 'fused_attn', False) is True]
    for module in switched:
        module.fused_attn = False  # type: ignore[assignment]
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            model(image)
    finally:
        for module in switched:
            module.fused_attn = True  # type: ignore[assignment]
    return int(counter.get_total_flops()) // 2


def _seconds(call: Callable[[], Any], device: torch.device, fewest: int) -> list[float]:
    def settle() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    for _ in range(max(2, fewest // 4)):
        call()
    settle()
    times: list[float] = []
    end = time.perf_counter() + _LIMIT_S
    while len(times) < _RUNS and (len(times) < fewest or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        settle()
        times.append(time.perf_counter() - start)
    return times


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type == 'cuda':
        return {'peak_memory_mib': torch.cuda.max_memory_allocated(device) / 2 ** 20}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == 'darwin' else 1024
    return {'peak_process_memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20}


@torch.inference_mode()
def measure_cost(
        model: nn.Module,
        input_size: tuple[int, ...],
        batch_size: int,
        device: torch.device,
        precision: Precision,
        channels_last: bool = False,
) -> dict[str, float]:
    """Times forward passes on random images that are on the device already.

    Args:
        model: in the form that is measured, in eval mode.
        input_size: (channels, height, width).
        batch_size: images per batch, for throughput and memory.
        device: where to.
        precision: autocast and dtype.
        channels_last: layout of the images.

    Returns:
        `latency_p50_ms`, `latency_p90_ms`, `latency_p99_ms` of a single image with the transfer of control to and from
        the device, `latency_runs`; `batch_size`, `throughput` in images per second at the median time of a batch;
        `peak_memory_mib` allocated on a CUDA device by model and batch, or else `peak_process_memory_mib`, the most
        that the process has had so far.
    """
    def caller(images: int) -> Callable[[], torch.Tensor]:
        image = torch.randn((images, *input_size), device=device, dtype=precision.model_dtype or torch.float32)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)

        def call() -> torch.Tensor:
            with precision.autocast():
                return first_output(model(image))
        return call

    single = np.array(_seconds(caller(1), device, 20)) * 1e3
    cost = {f'latency_p{share}_ms': float(np.percentile(single, share)) for share in (50, 90, 99)}
    cost['latency_runs'] = len(single)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    batch = _seconds(caller(batch_size), device, 5)
    cost |= {'batch_size': batch_size, 'throughput': batch_size / float(np.median(batch))}
    return cost | _peak_memory(device)
