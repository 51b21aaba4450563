"""Times of a call on a device: its kernels alone, with launches, and as a CUDA graph. On a CPU, the call's own time."""
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def synchronize(device: str) -> None:
    """Waits for the device."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def call_ms(run: Run, device: str, repeats: int, warm_up: int = 2) -> float:
    """Median time of a call in ms, launches included."""
    for _ in range(warm_up):
        run()
    synchronize(device)
    times = []
    for _ in range(repeats):
        if torch.device(device).type == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def kernels_ms(run: Run, device: str, repeats: int = 3) -> dict[str, float]:
    """Time of every kernel of a call in ms, by name, the longest first; on a CPU, of every operator."""
    cuda = torch.device(device).type == 'cuda'
    activity = torch.profiler.ProfilerActivity
    run()
    synchronize(device)
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        for _ in range(repeats):
            run()
        synchronize(device)
    times: dict[str, float] = {}
    for event in profile.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds:
            times[event.key] = times.get(event.key, 0.0) + microseconds / repeats / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def graph_ms(run: Run, device: str, repeats: int) -> float:
    """Median time of a call that was captured in a CUDA graph, in ms."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return call_ms(graph.replay, device, repeats)
