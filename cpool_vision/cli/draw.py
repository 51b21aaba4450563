"""Command line of the picture of supports: `cpool-draw MODEL -o supports.png`."""
import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import common


def build_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag of `cpool-draw`."""
    from timm.utils import ParseKwargs

    parser = argparse.ArgumentParser(
        prog='cpool-draw',
        description='Draw images with the supports and pooling weights that a model learned, one row per image.')
    add = parser.add_argument
    add('model', metavar='MODEL', help='registered name, local-dir:FOLDER or hf-hub:OWNER/NAME')
    add('images', nargs='*', metavar='IMAGE', help='image files; without them --dataset is drawn from')
    add('-o', '--output', required=True, metavar='FILE', help='picture to write: .png, .pdf or .svg')
    add('--checkpoint', default='', metavar='PATH', help='weights to load')
    add('--use-ema', action='store_true', help='take the averaged weights from the checkpoint if it has them')
    add('--pretrained', action='store_true',
        help="load the model's pretrained weights; a local-dir: or hf-hub: name without --checkpoint does so anyway")
    add('--num-classes', type=int, default=None, metavar='N', help='number of classes (model default if left out)')
    add('--img-size', type=int, default=None, metavar='N', help='side of a square input image, in pixels')
    add('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='channel means used in training')
    add('--std', type=float, nargs='+', default=None, metavar='STD', help='channel standard deviations of training')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='further arguments of the model')
    add('--dataset', default=None, metavar='NAME', help='data set to draw from (default: cpool/shapes)')
    add('--data-dir', default=None, metavar='DIR', help='root folder of the data')
    add('--split', default='validation', metavar='NAME', help='split to draw from (default: validation)')
    add('--num-images', type=int, default=4, metavar='N', help='images from the data set (default: 4)')
    add('--seed', type=int, default=0, metavar='S', help='which images are taken (default: 0)')
    add('--layers', nargs='+', default=['2'], metavar='NAME',
        help='names of context pools, or one number: so many, spread over the model (default: 2)')
    add('--dpi', type=int, default=200, help='dots per inch (default: 200)')
    return parser


def _settings(args: argparse.Namespace) -> argparse.Namespace:
    """The settings of validation, with ours in their place."""
    from cpool_vision.engine.args_validate import build_parser as build_validate_parser

    settings = build_validate_parser().parse_args([])
    for key, value in vars(args).items():
        setattr(settings, key, value)
    # a folder of images has no name of its own
    settings.dataset = args.dataset if args.dataset is not None else '' if args.data_dir else 'cpool/shapes'
    settings.seed = 42
    return settings


def _pictures(args: argparse.Namespace, settings: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """PIL images and their labels."""
    import numpy as np
    from PIL import Image

    from cpool_vision.engine.data import build_dataset
    from cpool_vision.engine.errors import ConfigError, DatasetError

    pictures: list[Any] = []
    labels = []
    if args.images:
        for path in args.images:
            try:
                with Image.open(path) as image:
                    pictures.append(image.convert('RGB'))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DatasetError(f'image {path!r} cannot be read ({error}): name an image file') from error
            labels.append(os.path.splitext(os.path.basename(path))[0][:18])
        return pictures, labels
    if args.num_images < 1:
        raise ConfigError(f'--num-images must be >= 1, got {args.num_images}')
    dataset = build_dataset(settings, args.split, False, 'RGB', None)
    if not hasattr(dataset, '__len__'):
        raise DatasetError(f'data set {settings.dataset!r} is a stream: name image files instead')
    names = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}
    names = {index: name for name, index in names.items()}
    for index in np.random.default_rng(args.seed).permutation(len(dataset))[:args.num_images]:
        image, target = dataset[int(index)]
        pictures.append(image)
        labels.append(str(names.get(target, target)).replace('_', ' ')[:18])
    return pictures, labels


def _draw(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    import torch
    from timm.data import create_transform, resolve_data_config

    import cpool_vision  # noqa: F401 - registers the variants
    from cpool_vision.engine.errors import ConfigError, OutputError, UnknownModelError
    from cpool_vision.engine.model import create_eval_model
    from cpool_vision.inspect import context_maps
    from cpool_vision.inspect.draw import PlotDependencyError, save_figure, supports_figure

    settings = _settings(args)
    # a folder or repository is named for its weights
    settings.pretrained = args.pretrained or (':' in args.model and not args.checkpoint)
    model = create_eval_model(settings).eval()
    data_config = resolve_data_config(vars(settings), model=model)
    transform: Any = create_transform(**{**data_config, 'crop_pct': 1.0}, is_training=False)
    pictures, labels = _pictures(args, settings)
    batch = torch.stack([transform(picture) for picture in pictures])
    try:
        maps = context_maps(model, batch)
    except ValueError as error:
        raise UnknownModelError(f'model {args.model!r}: {error}') from error
    mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ('mean', 'std'))
    shown = ((batch * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    layers = int(args.layers[0]) if len(args.layers) == 1 and args.layers[0].isdigit() else args.layers
    try:
        save_figure(supports_figure(shown, maps, layers, labels), args.output, args.dpi)
    except (PlotDependencyError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise OutputError(f'--output {args.output!r} cannot be written ({error.strerror}): name another file') \
            from error
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the supports of a model; see `--help`. Returns the exit code."""
    return common.run(_draw, argv)


if __name__ == '__main__':
    sys.exit(main())
