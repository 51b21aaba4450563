"""Times configurations of the kernels on a CUDA device: `python -m benchmarks.gpu.configs -o OUT.json`.

For every case and kernel it tries tiles, chunks, warps and caps on registers around the shipped configuration, compares
results with those of the shipped one, and prints the fastest. `ops.triton.launch` holds what was chosen by it.
"""
import argparse
import dataclasses
import fnmatch
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpool_vision.ops.triton import backward, forward, launch
from cpool_vision.ops.triton.launch import Config, Launch
from cpool_vision.ops.triton.layout import block_width
from cpool_vision.profile.cases import Case
from cpool_vision.profile.measure import device_info, machine

from .compile import arch_of, compile_kernels
from .operator import CASES

KERNELS = {'pool': forward.pool, 'grad_queries': backward.grad_queries, 'grad_keys': backward.grad_keys}
# Clock cycles that the device sleeps before a timed kernel, so that the launch is not measured.
_SLEEP = 800_000
# Largest relative difference from the shipped configuration's results.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_shipped = launch.choose_config


def shipped(case: Case, kernel: str) -> Config:
    """The configuration that the operator takes."""
    b, c, h, w = case.shape
    return _shipped(KERNELS[kernel], h, w, c // case.groups, case.torch_dtype)


def candidates(case: Case, kernel: str) -> list[Config]:
    """The shipped configuration, and others round it."""
    best = shipped(case, kernel)
    block = block_width(case.shape[3])
    tiles = [(2, 16), (4, 16), (8, 16), (16, 16)] if block == 16 else [(4, 8), (8, 8), (8, 16), (16, 8)]
    found = [best]
    for (tile_h, tile_w), chunk, warps, cap, prefetch in itertools.product(
            tiles, (1, 2, 4, 8), (2, 4, 8), (None, 96, 128, 168), (False, True)):
        fits = chunk * block >= 16 and tile_h * tile_w // 16 >= warps and 32 * warps * (cap or 0) <= 65536
        # Accumulators of a thread: what cannot be fast need not be compiled.
        if fits and tile_h * tile_w * max(chunk * block, best.block_c) // (32 * warps) <= 160 and (
                not prefetch or kernel != 'grad_queries'):
            found.append(Config(tile_h, tile_w, chunk, best.block_c, best.tail, warps, cap, prefetch))
    return list(dict.fromkeys(found))


@contextmanager
def configured(kernel: str, config: Config) -> Iterator[None]:
    """Has a kernel run as `config` says, and the others as shipped."""
    launch.choose_config = lambda which, *args: config if which is KERNELS[kernel] else _shipped(which, *args)
    launch.forget_launches()
    try:
        yield
    finally:
        launch.choose_config = _shipped
        launch.forget_launches()


@contextmanager
def timed(kernel: str, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> Iterator[None]:
    """Notes events before and after every launch of a kernel, behind a sleep that hides the launch itself."""
    plain = Launch.__call__

    def start(self: Launch, *tensors: Tensor) -> None:
        if self.kernel is not KERNELS[kernel]:
            return plain(self, *tensors)
        torch.cuda._sleep(_SLEEP)
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()
        plain(self, *tensors)
        events[-1][1].record()

    Launch.__call__ = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.__call__ = plain  # type: ignore[method-assign]


def run(inputs: tuple[Tensor, ...], grad: Tensor, stride: int) -> list[Tensor]:
    """Forward and backward pass."""
    x, weight_logits, sigma = inputs
    y, kept = launch.triton_forward(x, weight_logits, sigma, stride)
    return [y, *launch.triton_backward(grad, x, weight_logits, sigma, kept, stride)]


def measure(case: Case, kernel: str, config: Config, inputs: tuple[Tensor, ...], grad: Tensor, expected: list[Tensor],
            repeats: int = 5) -> dict[str, Any]:
    """Time of one kernel in ms, cold caches; and whether results are right, and the same in every run."""
    flush = torch.empty(2 ** 27, dtype=torch.uint8, device=grad.device)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    with configured(kernel, config):
        first = run(inputs, grad, case.stride)
        with timed(kernel, events):
            for _ in range(repeats):
                flush.zero_()
                last = run(inputs, grad, case.stride)
    torch.cuda.synchronize(grad.device)
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(first, expected, strict=True)]
    return {'config': config._asdict(), 'ms': statistics.median(a.elapsed_time(b) for a, b in events),
            'right': max(errors) <= _TOLERANCE[case.torch_dtype],
            'repeatable': all(map(torch.equal, first, last))}


def main(argv: list[str] | None = None) -> int:
    """Measures what the time allows, and prints the three fastest of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, required=True, help='JSON file')
    parser.add_argument('--case', default='*', help='pattern of the cases of benchmarks.gpu')
    parser.add_argument('--seconds', type=float, default=600.0)
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    cases: dict[str, Any] = {}
    results = {'machine': machine() | device_info('cuda'), 'cases': cases}
    for title in fnmatch.filter(CASES, args.case):
        case = dataclasses.replace(CASES[title], device='cuda')
        tried = {kernel: candidates(case, kernel) for kernel in KERNELS}
        workers = compile_kernels([(CASES[title], kernel, config) for kernel in KERNELS for config in tried[kernel]],
                                  arch_of('cuda'))
        inputs, grad = case.inputs()
        expected = run(inputs, grad, case.stride)
        workers.shutdown()
        for kernel, configs in tried.items():
            rows = []
            for config in configs:
                if time.monotonic() > end:
                    break
                try:
                    rows.append(measure(case, kernel, config, inputs, grad, expected))
                except Exception as error:  # one that cannot run must not cost the others their figures
                    rows.append({'config': config._asdict(), 'failed': f'{type(error).__name__}: {error}'[:200]})
            cases.setdefault(title, {})[kernel] = rows
            args.output.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
            good = sorted((row for row in rows if row.get('right') and row['repeatable']), key=lambda row: row['ms'])
            for row in good[:3]:
                print(f'{title}: {kernel} {row["ms"]:.4f} ms {Config(**row["config"])}', flush=True)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
