"""Command line to inspect models and runs: `cpool-inspect MODEL IMAGE... -o sheet.png --html report.html`."""
import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cpool_vision.engine.settings.flags import add_version_arg

from . import common
from .pictures import RANDOM, Loaded, add_picture_args, drawing, layers_of, load, load_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cpool_vision.inspect import ReceptiveField
    from cpool_vision.inspect.footprints import Footprints
    from cpool_vision.inspect.report import Report

_logger = logging.getLogger(__name__)
# flag: method that draws the figure, and its caption in a report
_FIGURES = {
    'output': ('sheet', 'For each layer: supports over the image (circles of one standard deviation σ), map of '
               'supports, and map of pooling weights relative to uniform weights, averaged over the groups of '
               'channels.'),
    'groups': ('groups', 'Supports and pooling weights of each group of channels of one context pool.'),
    'footprints': ('footprints', 'Weights with which the cells at the points read the map. Each footprint sums to one. '
                   'Dashed circles have a radius of one standard deviation σ.'),
    'depth': ('depth', 'Supports of every context pool over all images and cells, in pixels of the image.'),
    'receptive_field': ('receptive_field', 'Effective receptive field of one unit of the last feature map, or of '
                        '--rf-layer: root mean square of its gradient with respect to each pixel. Circles contain '
                        '50 % (solid) and 90 % (dashed).'),
}
_FLAGS = {'output': '--output', 'groups': '--groups', 'footprints': '--footprints', 'depth': '--depth',
          'receptive_field': '--receptive-field', 'json': '--json', 'html': '--html'}


def build_parser() -> argparse.ArgumentParser:
    """Returns a new parser with the flags of `cpool-inspect`."""
    parser = argparse.ArgumentParser(
        prog='cpool-inspect',
        description="Inspect a model's context pools: supports, pooling weights and receptive fields, as pictures, "
                    'numbers or an HTML report; or report on a training run.')
    add_version_arg(parser)
    add = parser.add_argument
    add('model', nargs='?', metavar='MODEL', help='registered name, local-dir:FOLDER or hf-hub:OWNER/NAME')
    add('images', nargs='*', metavar='IMAGE', help='image files (default: images of --dataset)')
    group = parser.add_argument_group('output files (pictures: .png, .pdf or .svg)')
    add = group.add_argument
    add('-o', '--output', metavar='FILE', help='images with their supports and pooling weights by layer')
    add('--groups', metavar='FILE',
        help='supports and pooling weights of each group of channels in the first layer of --layers')
    add('--footprints', metavar='FILE', help='pooling weights of the cells at --points, by layer')
    add('--depth', metavar='FILE', help='distribution of supports by depth')
    add('--receptive-field', metavar='FILE', help='effective receptive field with pools off and on')
    add('--json', metavar='FILE', help='all numbers')
    add('--html', metavar='FILE', help='report with everything above in one file')
    group = parser.add_argument_group('what to inspect')
    add = group.add_argument
    add('--run', metavar='RUN', help='folder of a training run, for --html; MODEL is then optional')
    add('--points', type=float, nargs='+', default=None, metavar='Y X',
        help="points in pixels of the model's input (default: a 3 x 3 grid)")
    add('--rf-layer', default=None, metavar='LAYER',
        help='feature map of the receptive field: name of a module that returns maps, or an index of the '
             "model's forward_intermediates (default: the last)")
    add('--rf-point', type=float, nargs=2, default=None, metavar=('Y', 'X'),
        help='point of the receptive field, in pixels (default: the middle unit)')
    add('--rf-probes', type=int, default=8, metavar='N',
        help='random projections of the channels, per image, for the receptive field (default: 8)')
    add_picture_args(parser)
    return parser


class Inspection:
    """Figures and numbers of a model, each computed when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        from cpool_vision.errors import ConfigError
        from cpool_vision.inspect import grid_points

        if args.points is not None and len(args.points) % 2:
            raise ConfigError(f'--points needs pairs Y X, got {len(args.points)} numbers')
        self.args = args
        self.loaded: Loaded = load(args)
        self.maps = load_maps(args, self.loaded)
        # window pools have no map of the whole image
        self.whole = {name: each for name, each in self.maps.items() if each.windows == 1}
        self._figures: dict[str, Figure] = {}
        flat = args.points
        self.points = grid_points(self.loaded.size) if flat is None else list(zip(flat[::2], flat[1::2], strict=True))

    @cached_property
    def _footprints(self) -> dict[str, 'Footprints']:
        from cpool_vision.inspect.footprints import footprints_of

        return {name: footprints_of(each, self.loaded.size, self.points, name) for name, each in self.whole.items()}

    @cached_property
    def _fields(self) -> tuple['ReceptiveField', 'ReceptiveField']:
        from cpool_vision.inspect import effective_receptive_field

        layer = self.args.rf_layer
        layer = int(layer) if layer is not None and layer.lstrip('-').isdigit() else layer
        point = tuple(self.args.rf_point) if self.args.rf_point else None
        before, after = (
            effective_receptive_field(self.loaded.model, self.loaded.batch, layer, point, pools, self.args.rf_probes)
            for pools in (False, True))
        return before, after

    def figure(self, flag: str) -> 'Figure':
        """Returns the figure of a flag; draws it once."""
        if flag not in self._figures:
            self._figures[flag] = getattr(self, _FIGURES[flag][0])()
        return self._figures[flag]

    def _over_images(self) -> None:
        if not self.whole:
            raise ValueError(f'model {self.args.model!r} pools windows only, not maps of the image: drop '
                             '--output, --groups and --footprints')

    def sheet(self) -> 'Figure':
        """Draws images with supports and pooling weights by layer."""
        from cpool_vision.inspect.draw import supports_figure

        self._over_images()
        return supports_figure(self.loaded.shown, self.whole, layers_of(self.args), self.loaded.labels)

    def groups(self) -> 'Figure':
        """Draws every group of channels of the first layer."""
        from cpool_vision.inspect.draw import groups_figure

        self._over_images()
        name = self._first_layer()
        return groups_figure(self.loaded.shown, self.whole[name], name, self.loaded.labels)

    def _first_layer(self) -> str:
        from cpool_vision.inspect.draw import pick_layers

        return pick_layers(list(self.whole), layers_of(self.args))[0]

    def footprints(self) -> 'Figure':
        """Draws the footprints of the cells at the points."""
        from cpool_vision.inspect.figures import footprints_figure

        self._over_images()
        return footprints_figure(
            self.loaded.shown, self._footprints, self.points, layers_of(self.args), self.loaded.labels)

    def depth(self) -> 'Figure':
        """Draws supports by depth."""
        from cpool_vision.inspect.figures import depth_figure

        return depth_figure(self.maps, self.loaded.size)

    def receptive_field(self) -> 'Figure':
        """Draws effective receptive fields with pools off and on."""
        from cpool_vision.inspect.figures import receptive_field_figure

        return receptive_field_figure(*self._fields)

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """All results as plain values."""
        from cpool_vision import __version__
        from cpool_vision.inspect import numbers

        config, size = self.loaded.data_config, self.loaded.size
        return {
            'model': self.args.model,
            'checkpoint': self.args.checkpoint or None,
            'weights': self.loaded.weights,
            'parameters': sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            'cpool_vision': __version__,
            'images': self.loaded.labels,
            'image_size': list(size),
            'mean': list(config['mean']),
            'std': list(config['std']),
            'layers': numbers.layer_numbers(self.maps, size),
            'histogram': numbers.histogram_numbers(self.maps, size),
            'footprints': numbers.footprint_numbers(self._footprints, size, self.points),
            'receptive_field': {
                'layer': self.args.rf_layer, 'probes': self.args.rf_probes,
                **numbers.receptive_field_numbers(*self._fields)},
        }

    def add_to(self, report: 'Report') -> None:
        """Adds the sections on the model to a report."""
        numbers, field = self.numbers, self.numbers['receptive_field']
        report.section('Model')
        report.table(('', ''), [
            ('model', numbers['model']),
            ('weights', self.loaded.weights),
            ('parameters', f'{numbers["parameters"]:,}'),
            ('input', ' x '.join(map(str, numbers['image_size'])) + ' px'),
            ('images', ', '.join(numbers['images'])),
            ('cpool_vision', numbers['cpool_vision'])])
        report.section('Supports by layer')
        report.table(
            ('context pool', 'grid', 'stride', 'groups', 'mean (px)', '5 % (px)', 'median (px)', '95 % (px)',
             'limits (px)', 'effective pixels (%)', 'gate'),
            [(each['layer'], ' x '.join(map(str, each['grid'])), each['stride'], each['groups'], each['mean_px'],
              each['q05_px'], each['q50_px'], each['q95_px'],
              '' if each['limits_px'] is None else '–'.join(f'{limit:.3g}' for limit in each['limits_px']),
              100 * each['effective_pixels'], '–' if each['gate'] is None else each['gate'])
             for each in numbers['layers']],
            'Supports are standard deviations in pixels of the image. Effective pixels: number of equally weighted '
            'pixels with the same entropy as the pooling weights, relative to all pixels of the map. Gate: mean '
            'absolute gate of a layer with init="identity"; 0 returns the input.', digits=3)
        for name, (_, caption) in _FIGURES.items():
            if name in ('output', 'groups', 'footprints') and not self.whole:
                continue
            if name == 'groups' and self.whole[self._first_layer()].sigma.shape[1] == 1:
                continue
            report.section({'output': 'Supports and weights over the images', 'groups': 'Groups of channels',
                            'footprints': 'Footprints',
                            'depth': 'Supports by depth', 'receptive_field': 'Effective receptive field'}[name])
            report.figure(self.figure(name), caption, self.args.dpi)
        report.table(
            ('', '50 % within (px)', '90 % within (px)'),
            [(title, field[key]['radius_50_px'], field[key]['radius_90_px'])
             for title, key in (('pools off', 'pools_off'), ('pools on', 'pools_as_they_are'))])


def _check(args: argparse.Namespace) -> list[str]:
    """Checks the flags; returns the names of the output flags that are set.

    Raises:
        ConfigError: No output flag is set, or flags cannot be combined.
        OutputError: A file cannot be written.
    """
    from cpool_vision.engine.validate.results import check_writable
    from cpool_vision.errors import ConfigError
    from cpool_vision.inspect.canvas import check_suffix

    wanted = [name for name in _FLAGS if getattr(args, name)]
    if not wanted:
        raise ConfigError(f'nothing to write: give one of {", ".join(_FLAGS.values())}')
    if args.dpi < 1:
        raise ConfigError(f'--dpi must be >= 1, got {args.dpi}')
    if args.run and not args.html:
        raise ConfigError(f'--run {args.run!r} needs --html FILE: add it')
    if args.model is None and (wanted != ['html'] or not args.run):
        raise ConfigError(f'{_FLAGS[wanted[0]]} needs a MODEL: name one, or use --run with --html only')
    for name in wanted:
        path = getattr(args, name)
        if name in _FIGURES:
            with drawing(_FLAGS[name], path):
                check_suffix(path)
        else:
            check_writable(path, _FLAGS[name])
    return wanted


def _inspect(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    wanted = _check(args)
    from cpool_vision.files import write_text
    from cpool_vision.inspect.draw import save_figure
    from cpool_vision.inspect.report import Report

    from .inspect_run import add_run

    inspection = Inspection(args) if args.model is not None else None
    for name in wanted:
        path = getattr(args, name)
        with drawing(_FLAGS[name], path):
            if name == 'html':
                run = os.path.basename(os.path.abspath(args.run)) if args.run else ''
                report = Report(f'Run {run}' if run else f'Context pools of {args.model}',
                                f'{args.model or "Run folder"} {args.run or ""}'.strip() if run else '')
                if args.run:
                    add_run(report, args.run, args.dpi)
                if inspection is not None:
                    inspection.add_to(report)
                write_text(path, report.html())
            elif inspection is not None and name == 'json':
                write_text(path, json.dumps(inspection.numbers, indent=1, ensure_ascii=False) + '\n')
            elif inspection is not None:
                save_figure(inspection.figure(name), path, args.dpi)
        print(path)
    if inspection is not None and inspection.loaded.weights == RANDOM:
        _logger.warning('Model %s has random weights, so these results mean little. Load trained weights with '
                        '--checkpoint, --pretrained or local-dir:FOLDER.', args.model)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects a model or a run, see `--help`. Returns the exit code."""
    return common.run(_inspect, argv)


if __name__ == '__main__':
    sys.exit(main())
