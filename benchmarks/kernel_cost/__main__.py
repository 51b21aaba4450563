"""Static cost of the operator's Triton kernels on an H100 or H200: `python -m benchmarks.kernel_cost [--write]`.

Every kernel of a forward and a backward pass is compiled for sm_90 as the call would compile it, and its machine code
is read and played on one scheduler with as many warps as fit (`simulate`). No device is needed, and none is used:
these are forecasts. The same simulation comes to 0.68 to 0.96 of what the kernels took on an H200 in five cases
(`benchmarks/results/gpu_h200_configs.json`), so that a time between `simulated / 0.96` and `simulated / 0.68` is to be
expected elsewhere.
"""
import sys
from pathlib import Path

from benchmarks.markers import run_command

from .cost import Cost, costs
from .launches import Call

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'operator.md'
# By name: the call, the time in ms aimed at on an H200, and what the kernels of version 0.1 took there.
CASES: dict[str, tuple[Call, float, float]] = {
    'ViT-B 14x14, 16 groups': (Call(128, 768, 14, 14, 16, 3.5), 0.25, 3.25),
    'ViT-S 14x14, 16 groups, B 256': (Call(256, 384, 14, 14, 16, 3.5), 0.35, 6.55),
    '28x28, 192 channels, 16 groups': (Call(128, 192, 28, 28, 16, 2.8), 1.2, 27.6),
    '56x56, 96 channels, supports to 2': (Call(64, 96, 56, 56, 1, 2.0), 0.6, 4.41),
    '56x56, 96 channels, supports to 5.6': (Call(64, 96, 56, 56, 1, 5.6), 1.5, 12.3),
    'ViT-B 24x24, 16 groups': (Call(64, 768, 24, 24, 16, 6.0), 0.9, 7.44),
    'ViT-B 14x14, 1 group': (Call(128, 768, 14, 14, 1, 3.5), 0.15, 1.16),
    'ResNet-50 14x14, 1 group': (Call(128, 1024, 14, 14, 1, 1.4), 0.2, 1.47),
}
# Of simulated to measured time.
LOW, HIGH = 0.68, 0.96


def table_of_kernels(rows: dict[str, list[Cost]]) -> str:
    """A line for each kernel."""
    lines = ['| case | kernel | instructions per pair | exponentials per pair | registers '
             '| programs per multiprocessor | simulated (ms) |', '|---|---|---|---|---|---|---|']
    for title, kernels in rows.items():
        for k in kernels:
            pairs = (f'{k.instructions_per_pair:.1f}', f'{k.exponentials_per_pair:.2f}') if k.pairs else ('', '')
            lines.append(f'| {title} | `{k.kernel}` | {pairs[0]} | {pairs[1]} | {k.registers} | {k.ctas_per_sm} '
                         f'| {k.simulated_ms:.3f} |')
    return '\n'.join(lines)


def table_of_cases(rows: dict[str, list[Cost]]) -> str:
    """A line for each case: forecast and aim of a forward and backward pass."""
    lines = ['| case | version 0.1, measured (ms) | simulated (ms) | forecast (ms) | target (ms) |',
             '|---|---|---|---|---|']
    for title, kernels in rows.items():
        total = sum(k.simulated_ms for k in kernels)
        _, aim, before = CASES[title]
        lines.append(f'| {title} | {before:g} | {total:.3f} | {total / HIGH:.2f} to {total / LOW:.2f} | {aim:g} |')
    return '\n'.join(lines)


def make_tables() -> dict[str, str]:
    """The text between the markers of the page."""
    rows = {title: costs(call) for title, (call, _, _) in CASES.items()}
    return {'kernel-forecast': table_of_cases(rows), 'kernel-cost': table_of_kernels(rows)}


if __name__ == '__main__':
    sys.exit(run_command(None, __doc__, PAGE, make_tables))
