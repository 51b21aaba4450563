"""Command line of the picture of supports: `cpool-draw MODEL -o supports.png`, a part of `cpool-inspect`."""
import argparse
import sys
from collections.abc import Sequence

from . import common
from .pictures import add_picture_args, drawing, layers_of, load, load_maps


def build_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag of `cpool-draw`."""
    parser = argparse.ArgumentParser(
        prog='cpool-draw',
        description='Draw images with the supports and pooling weights that a model learned, one row per image. '
                    'cpool-inspect -o draws the same, and more.')
    parser.add_argument('model', metavar='MODEL', help='registered name, local-dir:FOLDER or hf-hub:OWNER/NAME')
    parser.add_argument(
        'images', nargs='*', metavar='IMAGE', help='image files; without them --dataset is drawn from')
    parser.add_argument('-o', '--output', required=True, metavar='FILE', help='picture to write: .png, .pdf or .svg')
    add_picture_args(parser)
    return parser


def _draw(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    from cpool_vision.inspect.draw import save_figure, supports_figure

    loaded = load(args)
    maps = load_maps(args, loaded)
    with drawing('--output', args.output):
        save_figure(supports_figure(loaded.shown, maps, layers_of(args), loaded.labels), args.output, args.dpi)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the supports of a model; see `--help`. Returns the exit code."""
    return common.run(_draw, argv)


if __name__ == '__main__':
    sys.exit(main())
