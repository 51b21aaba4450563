"""What commands that draw a model share: their arguments, the model and the images, and errors of drawing."""
import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from cpool_vision.engine.settings.shared import InputConfig

RANDOM = 'none loaded, random'


def add_picture_args(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which model, which images and which layers."""
    from timm.utils import ParseKwargs

    class KeyValues(ParseKwargs):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            for value in values:
                if '=' not in value:
                    parser.error(f'{option_string} takes KEY=VALUE, got {value!r}: put it before the flag, or behind '
                                 'another one')
            super().__call__(parser, namespace, values, option_string)

    add = parser.add_argument
    add('--checkpoint', default='', metavar='PATH', help='weights to load')
    add('--use-ema', action='store_true', help='take the averaged weights from the checkpoint if it has them')
    add('--pretrained', action='store_true',
        help="load the model's pretrained weights; a local-dir: or hf-hub: name without --checkpoint does so anyway")
    add('--num-classes', type=int, default=None, metavar='N', help='number of classes (model default if left out)')
    add('--img-size', type=int, default=None, metavar='N', help='side of a square input image, in pixels')
    add('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='channel means used in training')
    add('--std', type=float, nargs='+', default=None, metavar='STD', help='channel standard deviations of training')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='more arguments of the model')
    add('--dataset', default=None, metavar='NAME', help='dataset to draw from (default: cpool/shapes)')
    add('--data-dir', default=None, metavar='DIR', help='root folder of the data')
    add('--split', default='validation', metavar='NAME', help='split to draw from (default: validation)')
    add('--num-images', type=int, default=4, metavar='N', help='images from the dataset (default: 4)')
    add('--seed', type=int, default=0, metavar='S', help='which images are taken (default: 0)')
    add('--layers', nargs='+', default=['2'], metavar='NAME',
        help='names of context pools, or one number: so many, spread over the model (default: 2)')
    add('--dpi', type=int, default=200, help='dots per inch (default: 200)')


def layers_of(args: argparse.Namespace) -> list[str] | int:
    """What `--layers` asks for, as `inspect.draw.pick_layers` takes it."""
    return int(args.layers[0]) if len(args.layers) == 1 and args.layers[0].isdigit() else args.layers


@dataclass
class Loaded:
    """A model in eval mode and images for it.

    Attributes:
        model: the model, on the CPU.
        batch: `(B, C, H, W)`, its input.
        shown: `(B, H, W, 3)` uint8, the same images to look at.
        labels: B names.
        weights: where the model's weights come from.
        data_config: size and normalization of the input, as timm's `resolve_data_config` gives them.
    """

    model: 'nn.Module'
    batch: 'Tensor'
    shown: 'NDArray[np.uint8]'
    labels: list[str]
    weights: str
    data_config: 'InputConfig'

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.batch.shape[-2], self.batch.shape[-1]


def _file_labels(paths: list[str]) -> list[str]:
    """Names of files without their suffix, below that of their folder where names alone are not unique."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if len(set(stems)) < len(stems):
        folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
        stems = [f'{folder}/{stem}' for folder, stem in zip(folders, stems, strict=True)]
    return [stem if len(stem) <= 18 else f'{stem[:17]}…' for stem in stems]


def _pictures(args: argparse.Namespace, num_classes: int) -> tuple[list[Any], list[str]]:
    """PIL images and their labels."""
    import numpy as np
    from PIL import Image

    from cpool_vision.data.images import open_image
    from cpool_vision.engine.data.dataset import build_dataset
    from cpool_vision.engine.data.multi_label import Classes
    from cpool_vision.engine.data.unreadable import UnreadableImageError, sample_name
    from cpool_vision.engine.settings.shared import DataSettings
    from cpool_vision.errors import ConfigError, DatasetError
    from cpool_vision.reading import reason

    pictures: list[Any] = []
    labels = []
    if args.images:
        for path in args.images:
            try:
                pictures.append(open_image(path))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DatasetError(f'image {path!r} cannot be read ({reason(error)}): name an image file') from error
        return pictures, _file_labels(args.images)
    if args.num_images < 1:
        raise ConfigError(f'--num-images must be >= 1, got {args.num_images}')
    # a folder of images has no name of its own
    name = args.dataset if args.dataset is not None else '' if args.data_dir else 'cpool/shapes'
    settings = DataSettings(dataset=name, data_dir=args.data_dir)
    dataset = build_dataset(settings, Classes(num_classes), args.split, False, 'RGB', None)
    if not hasattr(dataset, '__len__'):
        raise DatasetError(f'dataset {name!r} is a stream: name image files instead')
    names = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}
    names = {index: name for name, index in names.items()}
    for index in np.random.default_rng(args.seed).permutation(len(dataset))[:args.num_images]:
        try:
            image, target = dataset[int(index)]
        except UnreadableImageError as error:
            raise DatasetError(f'image {sample_name(dataset, index)!r} cannot be read ({error}): restore it, or choose '
                               'others with --seed') from error
        pictures.append(image)
        labels.append(str(names.get(target, target)).replace('_', ' ')[:18])
    return pictures, labels


def load(args: argparse.Namespace) -> Loaded:
    """The model and the images that the arguments name.

    Raises:
        UserError: either cannot be had; the subclass and message say why.
    """
    import torch
    from timm.data import create_transform

    import cpool_vision  # noqa: F401 - registers the variants
    from cpool_vision.engine.model import create_eval_model, resolve_input
    from cpool_vision.engine.settings.shared import ModelSettings

    # a folder or repository is named for its weights
    pretrained = args.pretrained or (':' in args.model and not args.checkpoint)
    model: Any = create_eval_model(
        args.model, args.checkpoint, pretrained=pretrained, use_ema=args.use_ema, num_classes=args.num_classes,
        img_size=args.img_size, model_kwargs=args.model_kwargs)
    data_config = resolve_input(model, ModelSettings(
        model=args.model, img_size=args.img_size, mean=args.mean and tuple(args.mean),
        std=args.std and tuple(args.std)))
    whole: dict[str, Any] = {**data_config, 'crop_pct': 1.0}
    transform: Any = create_transform(**whole, is_training=False)
    pictures, labels = _pictures(args, args.num_classes or model.num_classes)
    batch = torch.stack([transform(picture) for picture in pictures])
    mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ('mean', 'std'))
    shown = ((batch * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    weights = args.checkpoint or ('those named by the model' if pretrained else RANDOM)
    return Loaded(model, batch, shown, labels, weights, data_config)


def load_maps(args: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """`context_maps` of what was loaded.

    Raises:
        UnknownModelError: the model has no context pool.
    """
    from cpool_vision.errors import UnknownModelError
    from cpool_vision.inspect import context_maps

    try:
        return context_maps(loaded.model, loaded.batch)
    except ValueError as error:
        raise UnknownModelError(f'model {args.model!r}: {error}, or put pools into this one with cpool-retrofit') \
            from error


@contextmanager
def drawing(flag: str, path: str) -> Iterator[None]:
    """Turns the errors of drawing into `path`, which `flag` named, into those of the command line."""
    from cpool_vision.errors import ConfigError, OutputError, UserError
    from cpool_vision.inspect.draw import PlotDependencyError

    try:
        yield
    except UserError:
        raise
    except (PlotDependencyError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise OutputError(f'{flag} {path!r} cannot be written ({error.strerror}): name another file') from error
