"""Profiles single calls and sweeps, and formats the results as tables."""
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from cpool_vision.errors import ConfigError
from cpool_vision.ops import BACKENDS

from .cases import Case
from .floor import floor
from .implementations import BASELINES, CONVOLUTION, NAMES, REFERENCE, implementations, refusals
from .measure import FORWARD, FORWARD_BACKWARD, peak_memory, quantiles, times_in_turn

_logger = logging.getLogger(__name__)

# Time limit for the runs of an implementation, see `times_in_turn`.
_LIMIT_SECONDS = 10.0


def chosen_names(backends: Sequence[str]) -> list[str]:
    """Returns the implementations to measure: the requested backends, the dense reference and the baselines.

    Raises:
        ConfigError: A name is neither `all` nor a backend.
    """
    for name in backends:
        if name != 'all' and name not in BACKENDS:
            raise ConfigError(f'--backend must be all or some of {", ".join(BACKENDS)}, got {name!r}')
    wanted = {REFERENCE, *BASELINES, *(BACKENDS if 'all' in backends else backends)}
    return [name for name in NAMES if name in wanted]


def availability(case: Case, names: Sequence[str]) -> dict[str, str | None]:
    """Returns why each implementation cannot run the case, or None if it can. Measures nothing."""
    reasons = refusals(case, case.inputs()[0])
    return {name: reasons[name] for name in names}


def profile(
        case: Case, names: Sequence[str], repeats: int, required: Sequence[str] = (), memory: bool = True,
) -> dict[str, Any]:
    """Measures implementations on a case.

    Args:
        case: The case.
        names: Implementations to measure.
        repeats: Number of timed runs of each.
        required: Implementations that must be able to run.
        memory: Whether to measure peak memory, in a run of its own.

    Returns:
        `case`, `floor`, `rows` (a dictionary per implementation that ran) and `refused` (reasons by name).

    Raises:
        ConfigError: A required implementation cannot run.
    """
    inputs, grad = case.inputs()
    reasons = refusals(case, inputs)
    for name in required:
        if reasons[name] is not None:
            raise ConfigError(f'--backend {name} cannot run: {reasons[name]}; drop it or use --backend all')
    refused = {name: reason for name in names if (reason := reasons[name]) is not None}
    functions = {name: f for name, f in implementations(case).items() if name in names and name not in refused}
    bound = floor(case, inputs)
    timed = FORWARD_BACKWARD if case.backward else FORWARD
    times, dropped = times_in_turn(functions, inputs, grad, (timed,), repeats, _LIMIT_SECONDS)
    medians = {name: quantiles(taken[timed])['median_ms'] for name, taken in times.items()}

    def ratio(above: str, below: str) -> float | None:
        return medians[above] / medians[below] if above in medians and below in medians else None

    rows = [{
        'implementation': name,
        **quantiles(times[name][timed]),
        'runs': len(times[name][timed]),
        'peak_memory_per_x': peak_memory(functions[name], inputs, grad, case.backward) if memory else None,
        'ratio_to_dense': ratio(REFERENCE, name),
        'cost_over_depthwise_7x7': ratio(name, CONVOLUTION),
        # the bound does not apply to the convolution
        'times_floor': medians[name] / bound['ms'] if name != CONVOLUTION else None,
    } for name in times]
    described = {**dataclasses.asdict(case), 'mean_support': case.mean_support}
    return {'case': described, 'floor': bound, 'rows': rows, 'refused': {**refused, **dropped}}


def sweep(
        case: Case, kind: str, values: Sequence[float], names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Profiles a case at several map sides (`size`) or mean supports in pixels (`support`).

    Returns:
        For each value, the result of `profile` without peak memory, and the value itself as `at`.
    """
    points = []
    for value in values:
        point = case.with_side(int(value)) if kind == 'size' else case.with_mean_support(value)
        _logger.info('%s %g', 'map side' if kind == 'size' else 'mean support', value)
        points.append({'at': value, **profile(point, names, repeats, memory=False)})
    return points


def _cells(*cells: object) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def _number(value: float | None, digits: int) -> str:
    return '-' if value is None else f'{value:.{digits}f}'


def availability_table(reasons: dict[str, str | None]) -> str:
    """Formats `availability` as a Markdown table."""
    lines = [_cells('implementation', 'can run', 'reason'), '|---|---|---|']
    lines += [_cells(name, 'no' if reason else 'yes', reason or '') for name, reason in reasons.items()]
    return '\n'.join(lines)


def profile_table(result: dict[str, Any]) -> str:
    """Formats the times, memory and ratios of a case as a Markdown table, followed by the floor and refusals."""
    lines = [
        _cells('implementation', 'median, ms', 'p20', 'p80', 'peak memory / x', 'times faster than dense',
               'times the floor'),
        '|---' + '|---:' * 6 + '|',
    ]
    for row in result['rows']:
        lines.append(_cells(
            row['implementation'], *(f'{row[key]:.3f}' for key in ('median_ms', 'p20_ms', 'p80_ms')),
            _number(row['peak_memory_per_x'], 1), _number(row['ratio_to_dense'], 2), _number(row['times_floor'], 1)))
    bound = result['floor']
    lines.append(
        f'\nfloor {bound["ms"]:.3g} ms, set by {bound["bound"]}: {bound["bytes"] / 1e6:.3g} MB at '
        f'{bound["copy_bytes_per_s"] / 1e9:.1f} GB/s of copying; {bound["flops"] / 1e9:.3g} GFLOP '
        f'({bound["pairs_per_cell"]:.1f} pairs per output cell) at {bound["gemm_flops_per_s"] / 1e9:.1f} GFLOP/s of '
        'matrix products')
    lines += [f'not run: {name}: {reason}' for name, reason in result['refused'].items()]
    return '\n'.join(lines)


def sweep_table(kind: str, points: Sequence[dict[str, Any]]) -> str:
    """Formats the time relative to the depthwise 7x7 convolution, a row per value and a column per implementation."""
    names = [name for name in NAMES if any(row['implementation'] == name for p in points for row in p['rows'])]
    head = 'map side' if kind == 'size' else 'mean support, px'
    lines = [_cells(head, *names, 'floor'), '|---:' * (len(names) + 2) + '|']
    for point in points:
        rows = {row['implementation']: row for row in point['rows']}
        costs = (rows[name]['cost_over_depthwise_7x7'] if name in rows else None for name in names)
        floor = point['floor']['ms'] / rows[CONVOLUTION]['median_ms'] if CONVOLUTION in rows else None
        lines.append(_cells(f'{point["at"]:g}', *(_number(cost, 2) for cost in costs), _number(floor, 3)))
    return '\n'.join(lines)


def heading(case: Case) -> str:
    """Describes a case in one line."""
    kind = 'smooth maps, ' if case.smooth else ''
    return (f'{"forward + backward" if case.backward else "forward"}, {"x".join(map(str, case.shape))} {case.dtype}'
            f'{" channels-last" if case.channels_last else ""}, groups {case.groups}, stride {case.stride}, supports '
            f'{kind}{case.sigma[0]:g} to {case.sigma[1]:g} px (mean {case.mean_support:g})')
