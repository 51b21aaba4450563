"""The table of a study and its plots: differences to the base are paired by seed."""
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpool_vision.inspect.canvas import new_figure, save_figure

from .spec import Study

CONFIDENCE = 0.95
# Names of the scores in percent, as tables show them, and as plots do.
SCORES = {'top1': 'top-1 (%)', 'miou': 'mIoU (%)', 'foreground_iou': 'IoU of objects (%)'}
AXES = {'top1': 'top-1 accuracy (%)', 'miou': 'mean intersection over union (%)',
        'foreground_iou': 'intersection over union (%)'}


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Mean and half width of Student's 95 % interval; None with fewer than two differences."""
    if len(differences) < 2:
        return None
    from scipy import stats
    error = statistics.stdev(differences) / len(differences) ** .5
    return statistics.mean(differences), float(stats.t.ppf(.5 + CONFIDENCE / 2, len(differences) - 1)) * error


def summarize(
        study: Study, results: Sequence[dict[str, Any]], ratios: dict[str, float], metric: str = 'top1',
) -> list[dict[str, Any]]:
    """One row per arm that has results: the score `metric` over seeds, paired difference to its base, costs."""
    scores: dict[str, dict[int, float]] = {}
    costs = {}
    for r in results:
        scores.setdefault(r['arm'], {})[r['seed']] = r[metric]
        costs[r['arm']] = (r['params'], r['macs'])
    rows = []
    for name, arm in study.arms.items():
        if name not in scores:
            continue
        values = list(scores[name].values())
        base = scores.get(arm.base or '', {})
        shared = [seed for seed in scores[name] if seed in base]
        rows.append({
            'arm': name,
            'label': arm.title,
            'base': arm.base,
            'seeds': len(values),
            'score': statistics.mean(values),
            'deviation': statistics.stdev(values) if len(values) > 1 else None,
            'pairs': len(shared),
            'difference': statistics.mean(scores[name][s] - base[s] for s in shared) if shared else None,
            'interval': paired_interval([scores[name][s] - base[s] for s in shared]),
            'params': costs[name][0],
            'macs': costs[name][1],
            'step_ratio': ratios.get(name),
        })
    return rows


def _difference(row: dict[str, Any]) -> str:
    if row['base'] is None:
        return 'base'
    if row['difference'] is None:
        return '-'
    if row['interval'] is None:
        return f'{row["difference"]:+.2f} (one seed)'
    return format_interval(*row['interval'])


def format_interval(mean: float, half: float) -> str:
    """A difference with its half width; one that holds zero is called no effect."""
    verdict = '' if abs(mean) > half else ', no effect'
    return f'{mean:+.2f} ± {half:.2f}{verdict}'


def arm_cell(name: str, label: str) -> str:
    """An arm in words, and its name in the study where that is another."""
    return label if label == name else f'{label} (`{name}`)'


def format_table(rows: Sequence[dict[str, Any]], metric: str = 'top1') -> str:
    """Markdown; an interval that holds zero is called no effect."""
    lines = [
        f'| arm | seeds | {SCORES[metric]} | difference to base (95 %) | parameters (M) | MACs (M) '
        '| step time / base |',
        '|---|---:|---:|---|---:|---:|---:|',
    ]
    for r in rows:
        deviation = '' if r['deviation'] is None else f' ± {r["deviation"]:.2f}'
        ratio = '-' if r['step_ratio'] is None else f'{r["step_ratio"]:.2f}'
        lines.append(
            f'| {arm_cell(r["arm"], r["label"])} | {r["seeds"]} '
            f'| {r["score"]:.2f}{deviation} | {_difference(r)} | {r["params"] / 1e6:.3f} '
            f'| {r["macs"] / 1e6:.1f} | {ratio} |')
    return '\n'.join(lines)


def difference_of(study: Study, arm: str, other: str) -> str:
    """The difference of two arms in words."""
    return f'{study.arms[arm].title} minus {study.arms[other].title}'


def contrast(
        results: Sequence[dict[str, Any]], arm: str, other: str, metric: str) -> tuple[int, tuple[float, float] | None]:
    """Number of seeds that both arms have, and mean and half width of their paired difference."""
    scores = {(r['arm'], r['seed']): r[metric] for r in results if r['arm'] in (arm, other)}
    seeds = sorted(seed for name, seed in scores if name == arm and (other, seed) in scores)
    return len(seeds), paired_interval([scores[arm, s] - scores[other, s] for s in seeds])


def format_contrasts(study: Study, results: Sequence[dict[str, Any]], metric: str = 'top1') -> str:
    """Markdown: the differences that the study names, paired by seed."""
    lines = [f'| difference in {SCORES[metric]} | seeds | mean (95 %) |', '|---|---:|---|']
    for arm, other in study.contrasts:
        pairs, interval = contrast(results, arm, other, metric)
        lines.append(
            f'| {difference_of(study, arm, other)} | {pairs} '
            f'| {"-" if interval is None else format_interval(*interval)} |')
    return '\n'.join(lines)


def draw(title: str, rows: Sequence[dict[str, Any]], path: Path, metric: str = 'top1') -> None:
    """Accuracy against MACs, and against step time where it was measured, with standard deviations over seeds.

    Raises:
        PlotDependencyError: matplotlib is not installed.
    """
    axes_of = [('macs', 1e-6, 'multiply-adds per image (M)')]
    if any(r['step_ratio'] is not None for r in rows):
        axes_of.append(('step_ratio', 1., 'time of a training step (base = 1)'))
    columns = max(1, int(70 * len(axes_of) / (6 + max(len(r['label']) for r in rows))))
    figure = new_figure(5.5 * len(axes_of), 3.6 + .2 * math.ceil(len(rows) / columns), layout='constrained')
    for axes, (key, scale, label) in zip(figure.subplots(1, len(axes_of), squeeze=False)[0], axes_of, strict=True):
        for i, r in enumerate(rows):
            if r[key] is None:
                continue
            axes.errorbar(
                r[key] * scale, r['score'], yerr=r['deviation'] or 0, fmt='osD^vP*X'[i % 8], color=f'C{i % 10}',
                capsize=3, markersize=6, label=r['label'])
        axes.set_xlabel(label)
        axes.set_ylabel(AXES[metric])
        axes.grid(alpha=.3)
        axes.spines[['top', 'right']].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize='small')
    figure.suptitle(title)
    save_figure(figure, str(path), dpi=130)


def draw_contrasts(study: Study, results: Sequence[dict[str, Any]], path: Path, metric: str = 'top1') -> None:
    """The differences that the study names, one line each, with their intervals.

    Raises:
        PlotDependencyError: matplotlib is not installed.
    """
    found = [(difference_of(study, a, b), contrast(results, a, b, metric)[1]) for a, b in study.contrasts]
    rows = [(name, interval) for name, interval in found if interval is not None]
    names = [textwrap.fill(name, 52) for name, _ in rows]  # a long name would leave no room for the differences
    lines = sum(name.count('\n') + 1 for name in names)
    figure = new_figure(8, 1.2 + .2 * len(rows) + .16 * lines, layout='constrained')
    axes = figure.subplots()
    for i, (_, (mean, half)) in enumerate(rows):
        axes.errorbar(mean, i, xerr=half, fmt='o', color='C0' if abs(mean) > half else '0.5', capsize=3)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.axvline(0, color='0.3', linewidth=.8)
    figure.supxlabel(
        f'difference in {AXES[metric]} with its 95 % interval; gray: no effect', fontsize='medium')
    axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(study.title)
    save_figure(figure, str(path), dpi=130)
