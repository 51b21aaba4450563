"""Measures time and peak memory, and records the machine."""
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpool_vision.ops import workspace
from cpool_vision.version import __version__

from .cases import Inputs
from .implementations import Function

FORWARD, FORWARD_BACKWARD = 'forward', 'forward_backward'

# Overwritten before every call on a GPU, so that inputs come from memory instead of the L2 cache.
_FLUSH_BYTES = 2 ** 28
_CUDA_WARM_UP = 3
# Fewest timed runs of an implementation that exceeds its time limit.
_MIN_RUNS = 3

Times = dict[str, dict[str, list[float]]]


def run_pass(function: Function, inputs: Inputs, grad: Tensor, backward: bool) -> None:
    """Runs a forward pass, or a forward and backward pass with the gradients of all inputs."""
    if not backward:
        with torch.no_grad():
            function(*inputs)
        return
    x, logits, sigma = (t.detach().requires_grad_() for t in inputs)
    function(x, logits, sigma).backward(grad)


def _host_timer(call: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return lambda: elapsed


class _CudaTimer:
    """Times calls on the device by CUDA events, with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> Callable[[], float]:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) * 1e-3
        return seconds


def timer_for(device: torch.device) -> Callable[[Callable[[], object]], Callable[[], float]]:
    """Returns a function that starts a call and returns another one, which waits for it and returns its seconds."""
    return _CudaTimer(device) if device.type == 'cuda' else _host_timer


def times_in_turn(
        functions: Mapping[str, Function],
        inputs: Inputs,
        grad: Tensor,
        passes: Sequence[str],
        repeats: int,
        limit_s: float = float('inf'),
) -> tuple[Times, dict[str, str]]:
    """Times all implementations in turn, so that other load on the machine affects all of them alike.

    Args:
        functions: Implementations by name.
        inputs: `(x, weight_logits, sigma)`.
        grad: Gradient of the output.
        passes: `FORWARD`, `FORWARD_BACKWARD` or both.
        repeats: Number of timed runs of each implementation, after a warm-up.
        limit_s: Time limit of an implementation in seconds; once exceeded, it stops after three timed runs or more.

    Returns:
        Seconds by implementation and pass, and the reason for each implementation that ran out of memory.
    """
    device = inputs[0].device
    timer = timer_for(device)
    warm_up = _CUDA_WARM_UP if device.type == 'cuda' else 1
    times: Times = {name: {each: [] for each in passes} for name in functions}
    dropped: dict[str, str] = {}
    for turn in range(-warm_up, repeats):
        waiting = []
        for name in list(times):
            if len(times[name][passes[0]]) >= _MIN_RUNS and sum(map(sum, times[name].values())) > limit_s:
                continue
            try:
                for each in passes:
                    call = functools.partial(run_pass, functions[name], inputs, grad, each == FORWARD_BACKWARD)
                    waiting.append((name, each, timer(call)))
            except torch.OutOfMemoryError:
                dropped[name] = 'it ran out of memory'
                del times[name]
        for name, each, wait in waiting:
            seconds = wait()
            if turn >= 0 and name in times:
                times[name][each].append(seconds)
    return times, dropped


def peak_memory(function: Function, inputs: Inputs, grad: Tensor, backward: bool = True) -> float:
    """Returns the peak memory of a call without its inputs, relative to the size of `x`, with no cached workspace."""
    x = inputs[0]
    workspace.clear()
    peak = (_cuda_peak if x.is_cuda else _cpu_peak)(lambda: run_pass(function, inputs, grad, backward), x.device)
    return peak / (x.numel() * x.element_size())


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides messages of torch's profiler about its start and stop, which no setting silences after its import."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cpu_peak(call: Callable[[], object], device: torch.device) -> int:
    prof: Any = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
    with _quiet_stderr():
        prof.start()
    try:
        call()
    finally:
        with _quiet_stderr():
            prof.stop()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Returns the median and the 20th and 80th percentile of times in seconds, converted to milliseconds."""
    ordered = sorted(times)
    return {
        'median_ms': statistics.median(ordered) * 1e3,
        'p20_ms': ordered[len(ordered) // 5] * 1e3,
        'p80_ms': ordered[(4 * len(ordered)) // 5] * 1e3,
    }


def _commit() -> str | None:
    """Returns the commit of the working tree that the package is imported from, or None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    try:
        lines = subprocess.run(
            ['git', 'rev-parse', '--show-toplevel', 'HEAD'],  # noqa: S607
            capture_output=True, text=True, check=True, cwd=root).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[1] if Path(lines[0]).resolve() == root else None


def machine() -> dict[str, str | int | None]:
    """Returns processor, threads, versions and commit."""
    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                   if line.startswith('model name'))
    except (OSError, StopIteration):
        pass
    return {
        'cpu': cpu,
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'cpool_vision': __version__,
        'commit': _commit(),
    }


def device_info(device: str) -> dict[str, str | None]:
    """Returns the name of the device and the versions that matter for it."""
    info: dict[str, str | None] = {'device': device, 'python': platform.python_version()}
    if torch.device(device).type == 'cuda':
        info.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
        try:
            import triton
            info['triton'] = triton.__version__
        except ImportError:
            info['triton'] = None
    return info
