"""Measures the cost of a model: multiply-adds, latency, throughput and memory."""
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from ..device import Precision
from .evaluate import first_output

_RUNS = 200
_LIMIT_S = 20.  # slower models get fewer runs


def count_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Counts the multiply-adds of a forward pass: half the operations that `FlopCounterMode` counts.

    A context pool counts as if each output cell read the whole map, attention as its matrix products.

    Args:
        model: A model that is not compiled or scripted.
        image: Input `(1, C, H, W)`.
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


def _seconds(call: Callable[[], object], device: torch.device, fewest: int) -> list[float]:
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
    """Times forward passes on random images that are already on the device.

    Args:
        model: The model, in eval mode, possibly compiled.
        input_size: (channels, height, width).
        batch_size: Images per batch, for throughput and memory.
        device: Device of the model.
        precision: Autocast and dtype.
        channels_last: Whether images are in NHWC layout.

    Returns:
        A dictionary of

        - `latency_p50_ms`, `latency_p90_ms`, `latency_p99_ms`: time of a single image, including launch and
          synchronization; `latency_runs`, the number of runs.
        - `throughput`: images per second at the median time of a batch of `batch_size`.
        - `peak_memory_mib`: memory allocated on a CUDA device; on other devices `peak_process_memory_mib`, the peak
          memory of the process so far.
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
