"""What finished runs tell beyond their accuracy: supports by depth, and accuracy at other image sizes."""
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpool_vision.engine.settings.config import read_validate
from cpool_vision.engine.validate.run import validate
from cpool_vision.hub import save_for_hub
from cpool_vision.inspect.canvas import new_figure, save_figure
from cpool_vision.profile.measure import machine

from ..release import load_run
from .report import arm_cell, paired_interval
from .runner import run_name
from .spec import Study


def draw_supports(study: Study, results: Sequence[dict[str, Any]], path: Path) -> bool:
    """Mean support of every pool by depth, one line per arm, seeds averaged, with its 5 to 95 % quantiles.

    Returns:
        Whether there was anything to draw.

    Raises:
        PlotDependencyError: matplotlib is not installed.
    """
    arms: dict[str, list[list[list[float]]]] = {}
    for r in results:
        if r.get('supports'):
            arms.setdefault(r['arm'], []).append(list(r['supports'].values()))
    if not arms:
        return False
    figure = new_figure(7., 4.8, layout='constrained')
    axes = figure.subplots()
    for i, (arm, seeds) in enumerate(arms.items()):
        layers = [
            [statistics.mean(column) for column in zip(*layer, strict=True)] for layer in zip(*seeds, strict=True)]
        places = [k + .06 * (i - len(arms) / 2) for k in range(1, len(layers) + 1)]
        mean, low, _, high = (list(column) for column in zip(*layers, strict=True))
        spread = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        axes.errorbar(
            places, mean, yerr=[[max(v, 0.) for v in side] for side in spread], fmt='-' + 'osD^vP*X'[i % 8],
            color=f'C{i % 10}', markersize=5, capsize=2, linewidth=1, elinewidth=.8, label=study.arms[arm].title)
    axes.set_xlabel('pool, counted from the input on')
    axes.set_ylabel('support size (pixels of the image)')
    axes.set_ylim(bottom=0)
    axes.locator_params('x', integer=True)
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize='small')
    figure.suptitle(study.title)
    save_figure(figure, str(path), dpi=130)
    return True


def score_sizes(
        study: Study, output: Path, names: Sequence[str], data_dir: Path, sizes: Sequence[int],
        split: str = 'validation') -> list[dict[str, Any]]:
    """Top-1 in percent of the last checkpoints on images scaled to other sizes, without further training."""
    rows = []
    for arm, seed in study.runs():
        name = run_name(arm.name, seed)
        if name not in names:
            continue
        model, settings, data_config = load_run(output / 'runs' / name)
        with tempfile.TemporaryDirectory() as folder:
            save_for_hub(model, Path(folder) / 'model', data_config=data_config)
            for size in sizes:
                argv = [
                    '--model', f'local-dir:{folder}/model', '--pretrained', '--data-dir', str(data_dir),
                    '--split', split, '--num-classes', str(settings['num_classes']), '--img-size', str(size),
                    '--workers', '0', '--log-freq', '1000']
                row = validate(read_validate(argv))
                rows.append({'arm': arm.name, 'seed': seed, 'size': size, 'top1': row['top1'], 'machine': machine()})
    return rows


def format_sizes(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean over seeds by arm and size, in brackets the paired difference to the base with its interval."""
    sizes = sorted({row['size'] for row in rows})
    scores = {(row['arm'], row['size'], row['seed']): row['top1'] for row in rows}
    seeds = sorted({row['seed'] for row in rows})
    lines = ['| arm | ' + ' | '.join(f'{size} px' for size in sizes) + ' |', '|---|' + '---:|' * len(sizes)]
    for name, arm in study.arms.items():
        cells = []
        for size in sizes:
            values = [scores[name, size, s] for s in seeds if (name, size, s) in scores]
            if not values:
                break
            pairs = [s for s in seeds if (name, size, s) in scores and (arm.base, size, s) in scores]
            interval = paired_interval([scores[name, size, s] - scores[arm.base, size, s] for s in pairs])
            brackets = '' if interval is None else f' ({interval[0]:+.2f} ± {interval[1]:.2f})'
            cells.append(f'{statistics.mean(values):.2f}{brackets}')
        if cells:
            lines.append(f'| {arm_cell(name, arm.title)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
