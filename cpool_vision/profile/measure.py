"""Times, peak memory, and what they depend on."""
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

# Overwritten before every call on a GPU, so that inputs come from memory and not from the L2 cache.
_FLUSH_BYTES = 2 ** 28
_CUDA_WARM_UP = 3
# Fewest counted runs of an implementation whose time is used up.
_MIN_RUNS = 3

Times = dict[str, dict[str, list[float]]]


def run_pass(function: Function, inputs: Inputs, grad: Tensor, backward: bool) -> None:
    """One forward pass, or one forward and backward pass with the gradients of every input."""
    if not backward:
        with torch.no_grad():
            function(*inputs)
        return
    x, logits, sigma = (t.detach().requires_grad_() for t in inputs)
    function(x, logits, sigma).backward(grad)


def _host_timer(call: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return lambda: elapsed


class _CudaTimer:
    """Times on the device by events, from a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> Callable[[], float]:
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


def timer_for(device: torch.device) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    """A function that runs a call and returns a function that waits for its time, in seconds."""
    return _CudaTimer(device) if device.type == 'cuda' else _host_timer


def times_in_turn(
        functions: Mapping[str, Function],
        inputs: Inputs,
        grad: Tensor,
        passes: Sequence[str],
        repeats: int,
        limit_s: float = float('inf'),
) -> tuple[Times, dict[str, str]]:
    """Runs every implementation in turn, so that what else the machine does falls on all alike.

    Args:
        functions: implementations by name.
        inputs: `(x, weight_logits, sigma)`.
        grad: gradient of the output.
        passes: of `FORWARD` and `FORWARD_BACKWARD`.
        repeats: counted runs of each; uncounted ones come first.
        limit_s: an implementation whose counted runs took so long gets no more of them, from the third on.

    Returns:
        Seconds by implementation and pass, and by implementation why it was dropped when memory ran out.
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
    """Bytes that a call holds at once beyond its inputs, per byte of `x`, from a cold start."""
    x = inputs[0]
    workspace.clear()
    peak = (_cuda_peak if x.is_cuda else _cpu_peak)(lambda: run_pass(function, inputs, grad, backward), x.device)
    return peak / (x.numel() * x.element_size())


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides what the profiler itself reports of its start and stop, which no setting silences after the import."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cpu_peak(call: Callable[[], Any], device: torch.device) -> int:
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
    """Median and 20th and 80th percentile of seconds, in milliseconds."""
    ordered = sorted(times)
    return {
        'median_ms': statistics.median(ordered) * 1e3,
        'p20_ms': ordered[len(ordered) // 5] * 1e3,
        'p80_ms': ordered[(4 * len(ordered)) // 5] * 1e3,
    }


def _commit() -> str | None:
    """The commit of the working tree that the package is imported from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    try:
        lines = subprocess.run(
            ['git', 'rev-parse', '--show-toplevel', 'HEAD'],  # noqa: S607
            capture_output=True, text=True, check=True, cwd=root).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[1] if Path(lines[0]).resolve() == root else None


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions and commit."""
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


def device_info(device: str) -> dict[str, Any]:
    """The device's name, and the versions that matter on it."""
    info: dict[str, Any] = {'device': device, 'python': platform.python_version()}
    if torch.device(device).type == 'cuda':
        info.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
        try:
            import triton
            info['triton'] = triton.__version__
        except ImportError:
            info['triton'] = None
    return info
