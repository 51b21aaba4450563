"""Command line that makes one file of a checkpoint in parts: `cpool-consolidate RUN/last.sharded -o FILE`."""
import argparse
import sys
from collections.abc import Sequence

from . import common


def build_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag of `cpool-consolidate`."""
    parser = argparse.ArgumentParser(
        prog='cpool-consolidate',
        description='Make one file of a checkpoint that was written in parts (--checkpoint-format sharded).')
    add = parser.add_argument
    add('checkpoint', metavar='DIR', help='folder of parts, such as RUN/model_best.sharded')
    add('-o', '--output', required=True, metavar='FILE',
        help='.pth.tar or .pth: all of it, as --checkpoint-format full writes it; .safetensors: the weights alone')
    add('--use-ema', action='store_true', help='the averaged weights (.safetensors)')
    add('--force', action='store_true', help='replace FILE')
    return parser


def _consolidate(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    from cpool_vision.engine.checkpoints.consolidate import consolidate

    consolidate(args.checkpoint, args.output, args.use_ema, args.force)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes one file of parts; see `--help`. Returns the exit code."""
    return common.run(_consolidate, argv)


if __name__ == '__main__':
    sys.exit(main())
