"""Tables of what `python -m benchmarks.gpu` measured: `python -m benchmarks.gpu.tables FILE.json [--write]`.

They go between the markers `gpu-tables` of docs/performance.md.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.markers import write_between

from .operator import AIMS, CASES
from .steps import COMPILED_AIM, MODELS

DEFAULT = Path(__file__).resolve().parents[2] / 'docs' / 'performance.md'
BEGIN, END = '<!-- gpu-tables -->', '<!-- /gpu-tables -->'
_KERNELS = 12


def _number(value: float | None, digits: int = 3) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _error(errors: dict[str, float] | None) -> str:
    return '' if not errors else ', '.join(f'{value:.1e}' for value in errors.values())


def operator_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One line for each implementation and case; those that failed or cannot run say why."""
    lines = [
        '| case | implementation | kernels (ms) | target | with launches (ms) | CUDA graph (ms) '
        '| times the bytes\' floor | errors of y, dx, dlogits, dsigma | peak memory / x |',
        '|---|---|---|---|---|---|---|---|---|']
    for title, rows in results.items():
        for row in rows:
            name = row['implementation']
            why = row.get('refused') or row.get('failed')
            if why:
                lines.append(f'| {title} | {name} | {" ".join(why.split())[:80].replace("|", "/")} | | | | | | |')
                continue
            aim = AIMS.get(title) if name == 'triton' else None
            lines.append(
                f'| {title} | {name} | {_number(row["kernel_ms"])} | {"" if aim is None else f"{aim:g}"} '
                f'| {_number(row["both_ms"])} | {_number(row.get("graph_ms"))} '
                f'| {row["kernel_ms"] / row["floor_ms"]:.1f} | {_error(row.get("errors"))} '
                f'| {_number(row["peak_memory_per_x"], 1)} |')
    return lines


def chosen_table(results: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Time of the kernels in the configurations that are shipped now, from `benchmarks.gpu.configs`."""
    from .configs import KERNELS, shipped
    lines = ['| case | `pool` (ms) | `grad_queries` | `grad_keys` | with `prepare` | target | before | depthwise 7x7 |',
             '|---|---|---|---|---|---|---|---|']
    for title, kernels in results['cases'].items():
        ms = {kernel: row['ms'] for kernel in KERNELS for row in kernels.get(kernel, ())
              if row.get('config') == shipped(CASES[title], kernel)._asdict()}
        rows = {row['implementation']: row for row in before['operator'].get(title, ())}
        if len(ms) < len(KERNELS) or 'triton' not in rows:
            continue
        whole = sum(ms.values()) + rows['triton']['kernels_ms']['prepare']
        lines.append(f'| {title} | {" | ".join(_number(ms[kernel]) for kernel in KERNELS)} | {_number(whole)} '
                     f'| {AIMS.get(title, 0):g} | {_number(rows["triton"]["kernel_ms"])} '
                     f'| {_number(rows.get("depthwise_7x7", {}).get("kernel_ms"))} |')
    return lines


def layer_table(results: list[dict[str, Any]]) -> list[str]:
    """Layers under bf16 autocast, forward and backward."""
    lines = ['| layer | predictor | kernels (ms) | the pool\'s own | with launches (ms) |', '|---|---|---|---|---|']
    for row in results:
        if 'failed' not in row:
            lines.append(f'| {row["layer"]} | {row["predictor"]} | {_number(row["kernel_ms"])} '
                         f'| {_number(row["pool_ms"])} | {_number(row["both_ms"])} |')
    return lines


def step_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Ratios of the steps' times to the base's."""
    aims = {f'{name} eager': aim for name, _, aim in MODELS} | {f'{name} compiled': COMPILED_AIM for name, *_ in MODELS}
    lines = ['| model | batch | base (ms) | variant / base | target | depthwise 7x7 / base |',
             '|---|---|---|---|---|---|']
    for title, rows in results.items():
        times = {row['arm']: row['step_ms'] for row in rows if 'arm' in row}
        if 'base' not in times:
            continue
        ratios = [_number(times[arm] / times['base'], 2) if arm in times else ''
                  for arm in ('variant', 'depthwise_7x7')]
        aim = aims.get(title)
        lines.append(f'| `{title}` | {rows[0].get("batch", "")} | {times["base"]:.1f} | {ratios[0]} '
                     f'| {"" if aim is None else f"{aim:.2f}"} | {ratios[1]} |')
    return lines


def kernel_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The kernels that cost a variant's step most beyond the base's, in ms."""
    lines = ['| model | kernel | variant - base (ms) | share of the base\'s kernels |', '|---|---|---|---|']
    for title, rows in results.items():
        arms = {row['arm']: row for row in rows if 'kernels_ms' in row}
        if not {'base', 'variant'} <= set(arms):
            continue
        base, variant = arms['base'], arms['variant']
        names = {*base['kernels_ms'], *variant['kernels_ms']}
        differences = {n: variant['kernels_ms'].get(n, 0.0) - base['kernels_ms'].get(n, 0.0) for n in names}
        differences['all kernels'] = variant['kernel_ms'] - base['kernel_ms']
        for name, ms in sorted(differences.items(), key=lambda item: -item[1])[:_KERNELS]:
            lines.append(f'| `{title}` | `{name[:60].replace("|", "/")}` | {ms:.2f} '
                         f'| {100 * ms / base["kernel_ms"]:.1f} % |')
    return lines


def _summary(skipped: list[str]) -> str:
    """What was skipped, without the cases or arms of each."""
    steps = (' eager', ' compiled')
    names = (what.rsplit(': ', 1)[0 if any(mode in what for mode in steps) else -1] for what in skipped)
    return ', '.join(dict.fromkeys(names))


def tables(results: dict[str, Any]) -> str:
    """Everything that was measured, as Markdown."""
    machine = results['machine']
    names = ('torch', 'triton', 'cuda', 'cpool_vision')
    versions = ', '.join(f'{name} {machine[name]}' for name in names if machine.get(name))
    parts = [f'{machine.get("gpu", machine["cpu"])}; {versions}; commit {machine.get("commit") or "unknown"}.']
    if 'tests' in results:
        parts += ['', f'Tests of the kernels there: {results["tests"]["summary"].strip("= ")}.']
    for table in (operator_table(results['operator']), layer_table(results.get('layers', [])),
                  step_table(results['steps']), kernel_table(results['steps'])):
        if len(table) > 2:
            parts += ['', *table]
    if results['skipped']:
        parts += ['', f'{len(results["skipped"])} measurements were skipped because the time was up: '
                  f'{_summary(results["skipped"])}.']
    return '\n'.join(parts)


def tables_of_configs(results: dict[str, Any], before: dict[str, Any]) -> str:
    """The kernels as configured now, what became of pipelined loops, and layers, as Markdown."""
    differed = [f'{row["kernel"]} with {row["num_stages"]} stages in {row["runs_that_differed"]} of 40 runs'
                for row in results.get('pipelined', ()) if row['runs_that_differed']]
    parts = ['Configured by `python -m benchmarks.gpu.configs`, kernels alone, cold caches:', '',
             *chosen_table(results, before)]
    if 'tests' in results:
        parts += ['', f'Tests of the kernels there: {results["tests"]["summary"].strip("= ")}.']
    if differed:
        parts += ['', f'Pipelined loops that gave other results from run to run: {"; ".join(differed)}.']
    if results.get('layers'):
        parts += ['', *layer_table(results['layers'])]
    return '\n'.join(parts)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables, or writes them between the markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='JSON file of benchmarks.gpu')
    parser.add_argument('--configs', type=Path, help='JSON file of benchmarks.gpu.configs, for a second part')
    parser.add_argument('--write', action='store_true', help='write into the file')
    parser.add_argument('--file', type=Path, default=DEFAULT, help='file with the markers (docs/performance.md)')
    args = parser.parse_args(argv)
    results = json.loads(args.results.read_text(encoding='utf-8'))
    text = tables(results)
    if args.configs:
        text += '\n\n' + tables_of_configs(json.loads(args.configs.read_text(encoding='utf-8')), results)
    if args.write:
        write_between(args.file, BEGIN, END, text)
    else:
        print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
