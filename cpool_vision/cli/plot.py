"""Command line for plotting training curves: `cpool-plot RUN [RUN ...] -o curves.png`."""
import argparse
import sys
from collections.abc import Sequence

from cpool_vision.engine.settings.flags import add_version_arg

from . import common
from .pictures import drawing


def build_parser() -> argparse.ArgumentParser:
    """Returns a parser with every flag of `cpool-plot`."""
    parser = argparse.ArgumentParser(
        prog='cpool-plot',
        description='Plot the loss, accuracy and learning rate of training runs, and the supports of each context '
                    'pool over time (the mean, and a band from the 5% to the 95% quantile).')
    add_version_arg(parser)
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='run folder of train.py; the run may be unfinished')
    add('-o', '--output', required=True, metavar='FILE', help='image file to write: .png, .pdf or .svg')
    add('--dpi', type=int, default=200, help='resolution in dots per inch (default: 200)')
    return parser


def _plot(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    from cpool_vision.engine.tracking.run_plots import read_run, runs_figure
    from cpool_vision.errors import ConfigError
    from cpool_vision.inspect.canvas import save_figure

    if args.dpi < 1:
        raise ConfigError(f'--dpi must be >= 1, got {args.dpi}')
    runs = [read_run(folder) for folder in args.runs]
    with drawing('--output', args.output):
        save_figure(runs_figure(runs), args.output, args.dpi)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Plots the curves of training runs; see `--help`. Returns the exit code."""
    return common.run(_plot, argv)


if __name__ == '__main__':
    sys.exit(main())
