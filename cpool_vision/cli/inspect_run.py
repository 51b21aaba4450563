"""Report sections on a training run: curves, metrics, supports and settings."""
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpool_vision.engine.tracking.run_plots import Curve
    from cpool_vision.inspect.report import Report


def read_settings(folder: str) -> dict[str, object]:
    """Reads the settings of a run from its args.yaml; returns {} if there is none.

    Raises:
        ConfigError: args.yaml cannot be read.
    """
    from cpool_vision.errors import ConfigError
    from cpool_vision.reading import read_yaml, reason

    path = os.path.join(folder, 'args.yaml')
    if not os.path.exists(path):
        return {}
    try:
        settings = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path!r} cannot be read ({reason(error)}): restore it, or remove it') from error
    if not isinstance(settings, dict):
        raise ConfigError(f'{path!r} must contain settings, got {type(settings).__name__}: restore it, or remove it')
    return settings


def _metrics(report: 'Report', epochs: 'Mapping[str, Curve]', settings: Mapping[str, object]) -> None:
    """Adds a table of all columns of summary.csv, at the best epoch by the run's own metric and at the last."""
    if not epochs:
        report.section('Metrics', 'No epoch is finished yet.')
        return
    metric = f'eval_{settings.get("eval_metric") or "top1"}'
    last = max(times[-1] for times, _ in epochs.values())
    best = last
    if metric in epochs:
        times, values = epochs[metric]
        best = times[(values.argmin() if metric == 'eval_loss' else values.argmax())]

    def at(curve: 'Curve', time: float) -> float | None:
        found = curve[1][curve[0] == time]
        return float(found[-1]) if len(found) else None

    report.section('Metrics', f'Best by {metric}: after {best:.0f} of {last:.0f} epochs.')
    rows = [(name, at(curve, best), at(curve, last)) for name, curve in epochs.items() if name != 'epoch']
    report.table(('', f'best, after {best:.0f}', f'last, after {last:.0f}'), rows, digits=5)


def add_run(report: 'Report', folder: str, dpi: int) -> None:
    """Adds the sections on a run, finished or not, to a report.

    Raises:
        ConfigError: The folder is not a run, or its files cannot be read.
    """
    from cpool_vision.engine.settings.train import build_parser
    from cpool_vision.engine.tracking.run_plots import read_run, runs_figure

    run = read_run(folder)
    settings = read_settings(folder)
    _metrics(report, run.epochs, settings)
    report.section('Curves')
    report.figure(runs_figure([run]), 'Loss, accuracy, learning rate and, if the run recorded them, the supports of '
                  'each context pool: mean, with a band from the 5 % to the 95 % quantile.', dpi)
    if run.supports:
        report.section('Supports at the end of the run')
        report.table(('context pool', 'mean (px)', '5 % (px)', 'median (px)', '95 % (px)'),
                     [(layer, *map(float, values[-1])) for layer, (_, values) in run.supports.items()])
    if settings:
        report.section('Settings')
        defaults = build_parser().parse_args([])
        changed = {key: value for key, value in settings.items() if value != getattr(defaults, key, None)}
        report.table(('setting', 'value'), [(key, _written(value)) for key, value in changed.items()],
                     'Settings that differ from the defaults')
        report.table(('setting', 'value'), [(key, _written(value)) for key, value in settings.items()],
                     folded=f'All {len(settings)} settings')


def _written(value: object) -> str:
    text = '' if value is None else ' '.join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 500 else f'{text[:500]}…'
