"""Arguments, model and images of the commands that draw a model."""
import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from cpool_vision.engine.settings.shared import InputConfig
    from cpool_vision.inspect import ContextMaps

RANDOM = 'none loaded, random'


def add_picture_args(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select model weights, images and layers."""
    from timm.utils import ParseKwargs

    class KeyValues(ParseKwargs):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            for value in values:
                if '=' not in value:
                    parser.error(f'{option_string} takes KEY=VALUE, got {value!r}: put it before the flag, or after '
                                 'another flag')
            super().__call__(parser, namespace, values, option_string)

    add = parser.add_argument
    add('--checkpoint', default='', metavar='PATH', help='weights to load')
    add('--use-ema', action='store_true', help='load averaged weights if the checkpoint has them')
    add('--pretrained', action='store_true',
        help="load the model's pretrained weights (always on for local-dir: and hf-hub: models without --checkpoint)")
    add('--num-classes', type=int, default=None, metavar='N', help="number of classes (default: the model's)")
    add('--img-size', type=int, default=None, metavar='N', help='side of a square input image, in pixels')
    add('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='channel means used in training')
    add('--std', type=float, nargs='+', default=None, metavar='STD',
        help='channel standard deviations used in training')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='more arguments of the model')
    add('--dataset', default=None, metavar='NAME', help='dataset to take images from (default: cpool/shapes)')
    add('--data-dir', default=None, metavar='DIR', help='root folder of the data')
    add('--split', default='validation', metavar='NAME', help='split to take images from (default: validation)')
    add('--num-images', type=int, default=4, metavar='N', help='number of images from the dataset (default: 4)')
    add('--seed', type=int, default=0, metavar='S', help='seed that selects the images (default: 0)')
    add('--layers', nargs='+', default=['2'], metavar='NAME',
        help='names of context pools, or how many to choose, spread over the model (default: 2)')
    add('--dpi', type=int, default=200, help='dots per inch (default: 200)')


def layers_of(args: argparse.Namespace) -> list[str] | int:
    """Returns the value of `--layers` for `inspect.draw.pick_layers`: names, or a number."""
    return int(args.layers[0]) if len(args.layers) == 1 and args.layers[0].isdigit() else args.layers


@dataclass
class Loaded:
    """A model in eval mode, and images.

    Attributes:
        model: The model, on the CPU.
        batch: Input of the model, `(B, C, H, W)`.
        shown: The same images for display, `(B, H, W, 3)` uint8.
        labels: Names of the images.
        weights: Source of the model's weights.
        data_config: Size and normalization of the input.
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
    """Returns file names without suffix, preceded by the folder if they are not unique."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if len(set(stems)) < len(stems):
        folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
        stems = [f'{folder}/{stem}' for folder, stem in zip(folders, stems, strict=True)]
    return [stem if len(stem) <= 18 else f'{stem[:17]}…' for stem in stems]


def _pictures(args: argparse.Namespace, num_classes: int) -> tuple[list['Image'], list[str]]:
    """Loads the images, and returns them with their labels."""
    import numpy as np
    from PIL.Image import DecompressionBombError

    from cpool_vision.data.images import open_image
    from cpool_vision.engine.data.dataset import build_dataset
    from cpool_vision.engine.data.fingerprint import classes_of
    from cpool_vision.engine.data.multi_label import Classes
    from cpool_vision.engine.data.unreadable import UnreadableImageError, sample_name
    from cpool_vision.engine.settings.shared import DataSettings
    from cpool_vision.errors import ConfigError, DatasetError
    from cpool_vision.reading import reason

    pictures: list[Image] = []
    labels = []
    if args.images:
        for path in args.images:
            try:
                pictures.append(open_image(path))
            except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
                raise DatasetError(f'image {path!r} cannot be read ({reason(error)}): name an image file') from error
        return pictures, _file_labels(args.images)
    if args.num_images < 1:
        raise ConfigError(f'--num-images must be >= 1, got {args.num_images}')
    # a folder of images is a dataset without a name
    name = args.dataset if args.dataset is not None else '' if args.data_dir else 'cpool/shapes'
    settings = DataSettings(dataset=name, data_dir=args.data_dir)
    dataset = build_dataset(settings, Classes(num_classes), args.split, False, 'RGB', None)
    if not hasattr(dataset, '__len__'):
        raise DatasetError(f'dataset {name!r} is streamed: name image files instead')
    names = {index: name for name, index in classes_of(dataset).items()}
    for index in np.random.default_rng(args.seed).permutation(len(dataset))[:args.num_images]:
        try:
            image, target = dataset[int(index)]
        except UnreadableImageError as error:
            raise DatasetError(f'image {sample_name(dataset, index)!r} cannot be read ({error}): restore it, or choose '
                               'other images with --seed') from error
        pictures.append(image)
        labels.append(str(names.get(target, target)).replace('_', ' ')[:18])
    return pictures, labels


def load(args: argparse.Namespace) -> Loaded:
    """Loads the model and the images that the arguments select.

    Raises:
        UserError: The model or an image cannot be loaded.
    """
    import torch
    from timm.data import create_transform

    import cpool_vision  # noqa: F401 - registers the variants
    from cpool_vision.engine.model import create_eval_model, resolve_input
    from cpool_vision.engine.settings.shared import ModelSettings

    # whoever names a folder or repository wants its weights
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
    weights = args.checkpoint or ('pretrained' if pretrained else RANDOM)
    return Loaded(model, batch, shown, labels, weights, data_config)


def load_maps(args: argparse.Namespace, loaded: Loaded) -> dict[str, 'ContextMaps']:
    """Returns the `context_maps` of a loaded model and its images.

    Raises:
        UnknownModelError: The model has no context pool.
    """
    from cpool_vision.errors import UnknownModelError
    from cpool_vision.inspect import context_maps

    try:
        return context_maps(loaded.model, loaded.batch)
    except ValueError as error:
        raise UnknownModelError(f'model {args.model!r}: {error}, or add pools to this one with cpool-retrofit') \
            from error


@contextmanager
def drawing(flag: str, path: str) -> Iterator[None]:
    """Turns errors of drawing to `path`, the value of `flag`, into errors of the command line."""
    from cpool_vision.errors import ConfigError, OutputError, UserError
    from cpool_vision.inspect.draw import PlotDependencyError

    try:
        yield
    except UserError:
        raise
    except (PlotDependencyError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise OutputError(f'{flag} {path!r} cannot be written ({error.strerror}): choose another file') from error
