"""Command line of the profiler: `cpool-profile --shape 4 96 56 56 --sigma 0.2 2 --backward`."""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpool_vision.cli import common
from cpool_vision.engine.settings.flags import add_version_arg

if TYPE_CHECKING:
    from .cases import Case

SWEEPS = ('size', 'support')


def build_parser() -> argparse.ArgumentParser:
    """Returns a new parser with the flags of `cpool-profile`."""
    parser = argparse.ArgumentParser(
        prog='cpool-profile',
        description='Measure time and memory of context pooling on this machine: every backend, a dense reference, '
                    'attention and a depthwise convolution on the same inputs, and a lower bound of the time.')
    add_version_arg(parser)
    add = parser.add_argument
    add('--shape', type=int, nargs=4, default=[4, 96, 56, 56], metavar=('B', 'C', 'H', 'W'),
        help='shape of the features (default: 4 96 56 56)')
    add('--sigma', type=float, nargs=2, default=[0.2, 2.0], metavar=('MIN', 'MAX'),
        help='range of the supports, in input pixels; they are uniformly distributed (default: 0.2 2)')
    add('--smooth', action='store_true', help='vary supports and weights smoothly over the map, as in real networks')
    add('--groups', type=int, default=1, metavar='G', help='groups of channels (default: 1)')
    add('--stride', type=int, default=1, metavar='S', help='pixels between output cells (default: 1)')
    add('--dtype', default='float32', metavar='NAME',
        help='dtype of the features: float32, bfloat16, float16 or float64 (default: float32)')
    add('--device', default='cpu', metavar='NAME', help='cpu, cuda or cuda:N (default: cpu)')
    add('--channels-last', action='store_true', help='use channels-last features')
    add('--backward', action='store_true', help='measure forward and backward instead of forward only')
    add('--backend', nargs='+', default=['all'], metavar='NAME',
        help='backends to measure besides the dense reference and the baselines, or all (default: all)')
    add('--repeats', type=int, default=7, metavar='N', help='timed runs of each implementation (default: 7)')
    add('--dry-run', action='store_true', help='report which implementations can run, without measuring')
    add('--sweep', nargs='+', default=[], choices=SWEEPS, help='also measure a range of map sides or mean supports')
    add('--sides', type=int, nargs='+', default=[7, 14, 28, 56, 112, 224], metavar='N',
        help='map sides of --sweep size (default: 7 14 28 56 112 224)')
    add('--supports', type=float, nargs='+', default=[0.3, 0.5, 1, 2, 4, 8], metavar='PX',
        help='mean supports of --sweep support, in input pixels (default: 0.3 0.5 1 2 4 8)')
    add('--json', default='', metavar='FILE', help='write all results as JSON')
    add('--plot', default='', metavar='FILE',
        help='measure and plot both sweeps, relative to a depthwise 7x7 convolution (.png, .pdf or .svg)')
    return parser


def _case(args: argparse.Namespace) -> 'Case':
    from .cases import Case

    b, c, h, w = args.shape
    return Case(
        (b, c, h, w), (args.sigma[0], args.sigma[1]), args.groups, args.stride, args.dtype, args.device,
        args.channels_last, args.smooth, args.backward)


def _check(args: argparse.Namespace) -> None:
    """Finds invalid flags before minutes of measuring."""
    from cpool_vision.errors import ConfigError, OutputError
    from cpool_vision.inspect.canvas import PlotDependencyError, check_suffix

    if args.repeats < 1:
        raise ConfigError(f'--repeats must be >= 1, got {args.repeats}')
    if min(args.sides) < 1:
        raise ConfigError(f'--sides must be >= 1, got {min(args.sides)}')
    if not min(args.supports) > 0:
        raise ConfigError(f'--supports must be > 0, got {min(args.supports):g}')
    for flag, path in (('--json', args.json), ('--plot', args.plot)):
        if not path:
            continue
        folder = os.path.dirname(os.path.abspath(path))
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise OutputError(f'{flag} {path!r} cannot be written ({error.strerror}): choose another file') from error
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            raise OutputError(f'{flag} {path!r} cannot be written: choose a file in a writable folder')
    if args.plot:
        try:
            check_suffix(args.plot)
        except (PlotDependencyError, ValueError) as error:
            raise ConfigError(f'--plot: {error}') from error


def _profile(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    from cpool_vision.errors import OutputError
    from cpool_vision.inspect.canvas import save_figure

    from . import report
    from .measure import device_info, machine
    from .plot import cost_figure

    _check(args)
    case = _case(args)
    names = report.chosen_names(args.backend)
    known: dict[str, Any] = {**machine(), **device_info(case.device)}
    threads = known['threads']
    where = known.get('gpu') or f'{known["cpu"]}, {threads} thread{"s" if threads > 1 else ""}'
    result: dict[str, Any] = {'machine': known}
    print(report.heading(case))
    print(', '.join([where, f'cpool_vision {known["cpool_vision"]}', *(
        f'{name} {known[name]}' for name in ('torch', 'cuda', 'triton', 'commit') if known.get(name))]) + '\n')
    if args.dry_run:
        result['available'] = report.availability(case, names)
        print(report.availability_table(result['available']))
    else:
        required = [name for name in args.backend if name != 'all']
        result.update(report.profile(case, names, args.repeats, required))
        print(report.profile_table(result))
        result['sweeps'] = {}
        for kind in SWEEPS:
            if kind in args.sweep or args.plot:
                values = args.sides if kind == 'size' else args.supports
                points = report.sweep(case, kind, sorted(values), names, args.repeats)
                result['sweeps'][kind] = points
                print(f'\ntime relative to the depthwise 7x7 convolution\n\n{report.sweep_table(kind, points)}')
    try:
        if args.json:
            with open(args.json, 'w', encoding='utf-8') as file:
                json.dump(result, file, indent=1)
            print(f'\nresults written to {args.json}')
        if args.plot and not args.dry_run:
            title = f'{"forward + backward" if case.backward else "forward"}, {case.dtype}, {where}'
            save_figure(cost_figure(result['sweeps'], title), args.plot)
            print(f'plot written to {args.plot}')
    except OSError as error:
        raise OutputError(f'results cannot be written ({error}): choose another file') from error


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles the operator, see `--help`. Returns the exit code."""
    return common.run(_profile, argv)


if __name__ == '__main__':
    sys.exit(main())
