"""Times the operator against dense eager, attention and convolution: `python -m benchmarks.op [-o FILE.json]`.

Every row compares implementations on the same inputs, in turn, within one run; a ratio is dense eager's median time
over the implementation's. Supports are independent and uniform in [0.1, 1] times the largest, which is harder to skip
than the smooth maps that a network predicts. Gradients are those of every input, and of the convolution's kernel. Peak
memory is what the allocator held beyond the inputs, in bytes of `x`.
"""
import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cpool_vision.ops import available_backends
from cpool_vision.profile.cases import Case
from cpool_vision.profile.implementations import implementations
from cpool_vision.profile.measure import (
    FORWARD,
    FORWARD_BACKWARD,
    machine,
    peak_memory,
    quantiles,
    times_in_turn,
)

from .markers import write_between

BEGIN, END = '<!-- op-table -->', '<!-- /op-table -->'
# B, C, H, W, largest support in pixels, and the ratio aimed at for forward and backward.
CASES = (
    (8, 384, 14, 14, 1.4, 1.3),
    (8, 192, 28, 28, 2.8, 2.5),
    (4, 96, 56, 56, 5.6, 8.0),
    (4, 96, 56, 56, 2.0, 20.0),
    (4, 64, 56, 56, 1.0, 25.0),
)


def make_case(b: int, c: int, h: int, w: int, largest: float) -> Case:
    return Case((b, c, h, w), (0.1 * largest, largest), backward=True)


def run_case(case: tuple[Any, ...], repeats: int) -> list[dict[str, Any]]:
    b, c, h, w, largest, target = case
    call = make_case(b, c, h, w, largest)
    inputs, grad = call.inputs()
    refused = available_backends(*inputs)
    functions = {name: f for name, f in implementations(call).items() if refused.get(name) is None}
    times, _ = times_in_turn(functions, inputs, grad, (FORWARD, FORWARD_BACKWARD), repeats)
    rows = []
    for name, function in functions.items():
        forward, both = (quantiles(t) for t in times[name].values())
        base_forward, base_both = (statistics.median(t) for t in times['reference'].values())
        rows.append({
            'shape': [b, c, h, w],
            'sigma_max': largest,
            'implementation': name,
            'forward': forward,
            'forward_backward': both,
            'forward_ratio': base_forward * 1e3 / forward['median_ms'],
            'forward_backward_ratio': base_both * 1e3 / both['median_ms'],
            'target_ratio': target if name == 'native' else None,
            'peak_memory_per_x': peak_memory(function, inputs, grad),
        })
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        '| B x C x H x W | sigma up to | implementation | forward, ratio | forward + backward, ratio | target '
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
    parser.add_argument('--write', type=Path, nargs='+', default=[], help='Markdown files with the markers')
    args = parser.parse_args()
    rows = [row for case in CASES for row in run_case(case, args.repeats)]
    print(table(rows))
    for path in args.write:
        write_between(path, BEGIN, END, table(rows))
    memory = {}
    for size in (56, 112):
        call = make_case(4, 96, size, size, size / 10)
        inputs, grad = call.inputs()
        memory[size] = peak_memory(implementations(call)['tiled'], inputs, grad)
        print(f'tiled, 4x96x{size}x{size}, sigma up to {size / 10:g}: peak memory {memory[size]:.1f} x the bytes of x')
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({'machine': machine(), 'rows': rows, 'tiled_memory_per_x': memory}, indent=1))
        print(f'figures in {args.output}')


if __name__ == '__main__':
    main()
