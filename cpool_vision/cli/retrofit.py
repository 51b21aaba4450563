"""Command line for retrofitting: `cpool-retrofit BASE -o DIR`."""
import argparse
import sys
from collections.abc import Sequence

from cpool_vision.engine.settings.flags import add_version_arg

from . import common


def build_parser() -> argparse.ArgumentParser:
    """Returns a new parser with the flags of `cpool-retrofit`."""
    from timm.utils import ParseKwargs

    parser = argparse.ArgumentParser(
        prog='cpool-retrofit',
        description='Add context pools to a timm model and save it as a folder for local-dir:. Until it is trained, '
                    'the model predicts exactly what its base does.')
    add_version_arg(parser)
    add = parser.add_argument
    add('base', metavar='BASE', help='registered name, local-dir:FOLDER or hf-hub:OWNER/NAME')
    add('-o', '--output', required=True, metavar='DIR', help='folder for config.json and model.safetensors')
    add('--force', action='store_true', help='overwrite the model in DIR')
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--pretrained', action='store_true',
                        help='load weights of the base from the hub or its folder (default: random weights)')
    source.add_argument('--checkpoint', default='', metavar='FILE', help='load weights of the base from a file')
    add('--use-ema', action='store_true', help='load averaged weights if the checkpoint has them')
    add('--positions', nargs='+', default=None, metavar='NAME',
        help='post_stage, post_block, pre_attn (default: depends on the network)')
    add('--stages', nargs='+', type=int, default=None, metavar='N',
        help='indices of the stages that pool (default: those at least 8 times coarser than the image)')
    add('--places', nargs='+', default=None, metavar='MODULE',
        help='modules whose output (with :input appended, whose input) to pool, instead of --positions and --stages')
    add('--ratio', type=float, default=None, metavar='R',
        help='largest support relative to the side of the map (default: 0.25 in networks with one grid, else 0.1)')
    add('--floor', type=float, default=0.1, metavar='S', help='smallest support in pixels (default: 0.1)')
    add('--groups', type=int, default=None, metavar='G',
        help='groups of channels with their own weights and supports (default: in networks with one grid, the largest '
             'number up to 16 that divides the channels, else 1)')
    add('--init', default='identity', choices=('identity', 'paper'),
        help='identity keeps the predictions of the base; paper pools from the start (default: identity)')
    add('--support-init', type=float, default=0.5, metavar='R',
        help='mean support of a new pool relative to the largest, between 0 and 1 (default: 0.5)')
    add('--num-classes', type=int, default=None, metavar='N', help="number of classes (default: the model's)")
    add('--in-chans', type=int, default=None, metavar='N', help="number of image channels (default: the model's)")
    add('--img-size', type=int, default=None, metavar='N', help='side of a square input image, in pixels')
    add('--seed', type=int, default=42, metavar='S', help='seed of the new pools, and of a base without weights')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='more arguments of the base')
    return parser


def _retrofit(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    import torch

    from cpool_vision.engine.model import create_eval_model
    from cpool_vision.errors import ConfigError, OutputError
    from cpool_vision.retrofit import add_context_pool, context_pools, save_model

    torch.manual_seed(args.seed)
    model = create_eval_model(
        args.base, args.checkpoint, pretrained=args.pretrained, use_ema=args.use_ema, num_classes=args.num_classes,
        in_chans=args.in_chans, img_size=args.img_size, model_kwargs=args.model_kwargs)
    before = sum(parameter.numel() for parameter in model.parameters())
    try:
        add_context_pool(
            model, positions=args.positions, stages=args.stages, places=args.places, ratio=args.ratio,
            floor=args.floor, groups=args.groups, init=args.init, support_init=args.support_init)
    except ValueError as error:
        raise ConfigError(f'{args.base}: {error}') from error
    try:
        save_model(model, args.output, force=args.force)
    except FileExistsError as error:
        raise OutputError(f'--output {args.output!r} already contains a model, or is a file: pass --force to overwrite '
                          'it, or choose another folder') from error
    except OSError as error:
        raise OutputError(f'--output {args.output!r} cannot be written ({error.strerror or error}): choose another '
                          'folder') from error
    after = sum(parameter.numel() for parameter in model.parameters())
    for name in context_pools(model):
        print(name)
    print(f'{len(context_pools(model))} context pools, {before:,} + {after - before:,} parameters')
    print(f'local-dir:{args.output}')


def main(argv: Sequence[str] | None = None) -> int:
    """Retrofits a model, see `--help`. Returns the exit code."""
    return common.run(_retrofit, argv)


if __name__ == '__main__':
    sys.exit(main())
