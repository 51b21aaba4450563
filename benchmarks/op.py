"""Times the operator against dense eager, attention and convolution: `python -m benchmarks.op [-o FILE.json]`.

Every row compares implementations on the same inputs, in turn, within one run; a ratio is dense eager's median time
over the implementation's. Supports are independent and uniform in [0.1, 1] times the largest, which is harder to skip
than the smooth maps that a network predicts. Gradients are those of every input, and of the convolution's kernel. Peak
memory is what the allocator held beyond the inputs, in bytes of `x`.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # the profiler's start and stop are of no interest

import torch
import torch.nn.functional as F
from torch import Tensor

from cpool_vision.ops import context_pool2d, context_pool2d_reference, workspace
from cpool_vision.version import __version__

# B, C, H, W, largest support in pixels, and the ratio aimed at for forward and backward.
CASES = (
    (8, 384, 14, 14, 1.4, 1.0),
    (8, 192, 28, 28, 2.8, 1.5),
    (4, 96, 56, 56, 5.6, 6.0),
    (4, 96, 56, 56, 2.0, 12.0),
    (4, 64, 56, 56, 1.0, 15.0),
)
Function = Callable[..., Tensor]


def sdpa_augmented(x: Tensor, weight_logits: Tensor, sigma: Tensor) -> Tensor:
    """The same weights as attention with keys `(p_j, |p_j|^2, l_j)`: right in fp32 only, since norms cancel."""
    b, c, h, w = x.shape
    rows = torch.arange(h, dtype=x.dtype) - (h - 1) / 2
    cols = torch.arange(w, dtype=x.dtype) - (w - 1) / 2
    p = torch.stack(torch.meshgrid(rows, cols, indexing='ij'), -1).view(1, h * w, 2).expand(b, -1, -1)
    inv = sigma.flatten(2).transpose(1, 2).square().reciprocal()
    query = torch.cat([p * inv, -inv / 2, torch.ones_like(inv)], -1)
    key = torch.cat([p, p.square().sum(-1, keepdim=True), weight_logits.flatten(2).transpose(1, 2)], -1)
    value = x.flatten(2).transpose(1, 2)
    out = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)
    return out[:, 0].transpose(1, 2).reshape(b, c, h, w)


def implementations(channels: int) -> dict[str, Function]:
    kernel = torch.nn.Parameter(torch.randn(channels, 1, 7, 7))
    return {
        'reference': context_pool2d_reference,
        'tiled': lambda x, logits, sigma: context_pool2d(x, logits, sigma, backend='tiled'),
        'sdpa_augmented': sdpa_augmented,
        'depthwise_7x7': lambda x, logits, sigma: F.conv2d(x, kernel, padding=3, groups=channels),
    }


def _forward_backward(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    leaves = [t.detach().requires_grad_() for t in inputs]
    function(*leaves).backward(grad)


def peak_memory(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> float:
    """Bytes that forward and backward hold at once beyond the inputs, per byte of `x`, from a cold start."""
    workspace.clear()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        _forward_backward(function, inputs, grad)
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (inputs[0].numel() * inputs[0].element_size())


def _quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        'median_ms': statistics.median(ordered) * 1e3,
        'p20_ms': ordered[len(ordered) // 5] * 1e3,
        'p80_ms': ordered[(4 * len(ordered)) // 5] * 1e3,
    }


def run_case(case: tuple[Any, ...], repeats: int) -> list[dict[str, Any]]:
    b, c, h, w, largest, target = case
    torch.manual_seed(0)
    x, grad = torch.randn(b, c, h, w), torch.randn(b, c, h, w)
    logits = torch.randn(b, 1, h, w)
    sigma = largest * (0.1 + 0.9 * torch.rand(b, 1, h, w))
    functions = implementations(c)
    inputs = (x, logits, sigma)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            with torch.no_grad():
                function(*inputs)
            middle = time.perf_counter()
            _forward_backward(function, inputs, grad)
            times[name][0].append(middle - start)
            times[name][1].append(time.perf_counter() - middle)
    rows = []
    for name, function in functions.items():
        forward, both = (_quantiles(t[1:]) for t in times[name])
        base_forward, base_both = (statistics.median(t[1:]) for t in times['reference'])
        rows.append({
            'shape': [b, c, h, w],
            'sigma_max': largest,
            'implementation': name,
            'forward': forward,
            'forward_backward': both,
            'forward_ratio': base_forward * 1e3 / forward['median_ms'],
            'forward_backward_ratio': base_both * 1e3 / both['median_ms'],
            'target_ratio': target if name == 'tiled' else None,
            'peak_memory_per_x': peak_memory(function, inputs, grad),
        })
    return rows


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions and commit."""
    try:
        commit = subprocess.run(
            ['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True,  # noqa: S607
            cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
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
        'commit': commit,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        '| B x C x H x W | sigma up to | implementation | forward, ratio | forward + backward, ratio | aim '
        '| peak memory / x |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        aim = f'{row["target_ratio"]:g}' if row['target_ratio'] else ''
        lines.append(
            f'| {"x".join(map(str, row["shape"]))} | {row["sigma_max"]:g} | {row["implementation"]} '
            f'| {row["forward_ratio"]:.2f} | {row["forward_backward_ratio"]:.2f} | {aim} '
            f'| {row["peak_memory_per_x"]:.1f} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, help='JSON file for the figures')
    parser.add_argument('-r', '--repeats', type=int, default=7, help='counted runs of each implementation')
    args = parser.parse_args()
    rows = [row for case in CASES for row in run_case(case, args.repeats)]
    print(table(rows))
    memory = {}
    for size in (56, 112):
        x = torch.randn(4, 96, size, size)
        inputs = (x, torch.randn(4, 1, size, size), size / 10 * (0.1 + 0.9 * torch.rand(4, 1, size, size)))
        memory[size] = peak_memory(implementations(96)['tiled'], inputs, torch.randn_like(x))
        print(f'tiled, 4x96x{size}x{size}, sigma up to {size / 10:g}: peak memory {memory[size]:.1f} x the bytes of x')
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({'machine': machine(), 'rows': rows, 'tiled_memory_per_x': memory}, indent=1))
        print(f'figures in {args.output}')


if __name__ == '__main__':
    main()
