"""albumentations in place of timm's training transforms: `Pipeline` reads a file, `Augmentation` transforms images."""
import functools
import importlib.metadata
import inspect
import logging
import os
import random
import warnings
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image

from .augment_config import CLASS, COMPOSITIONS, AugmentationError, find_node, nearest, read_config

__all__ = ['Augmentation', 'AugmentationError', 'Pipeline']

_logger = logging.getLogger(__name__)
_MAX_DEPTH, _MAX_TRANSFORMS = 8, 200
INPUT = 'input'  # stands for the side or size of the network's input
_INTERPOLATION = {'nearest': 0, 'linear': 1, 'cubic': 2, 'area': 3, 'lanczos': 4}  # cv2.INTER_*
_BORDER = {'constant': 0, 'replicate': 1, 'reflect': 2, 'wrap': 3, 'reflect_101': 4}  # cv2.BORDER_*
_NAMED = {'interpolation': _INTERPOLATION, 'upscale': _INTERPOLATION, 'downscale': _INTERPOLATION,
          'border_mode': _BORDER}
# settings of a Compose for boxes, key points and masks, which files of albumentations itself list
_IDLE: dict[str, tuple[Any, ...]] = {
    'bbox_params': (None,), 'keypoint_params': (None,), 'additional_targets': ({}, None), 'is_check_shapes': (True,)}
_VERSION = '2.0.'


def _import_albumentations() -> Any:
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # else importing it asks pypi.org for a newer release
    try:
        version = importlib.metadata.version('albumentations')
        import albumentations
    except ImportError as error:  # also if a fork with the same import name is installed
        raise AugmentationError(f'albumentations cannot be imported ({error}): pip install albumentations==2.0.8') \
            from error
    if not version.startswith(_VERSION):
        raise AugmentationError(f'albumentations {version} is installed, but pipelines need {_VERSION}x: pip install '
                                'albumentations==2.0.8')
    return albumentations


def _input_value(key: str, size: tuple[int, int]) -> Any:
    height, width = size
    return {'size': size, 'max_size_hw': size, 'height': height, 'min_height': height, 'width': width,
            'min_width': width, 'max_size': max(size)}.get(key)


def _plain(value: Any) -> Any:
    """Converts a value to plain JSON types."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def _warn_once(text: str) -> None:
    _logger.warning('%s', text)


def _inherited(kind: type) -> set[str]:
    inits = [vars(each)['__init__'] for each in kind.__mro__[:-1] if '__init__' in vars(each)]
    return {name for init in inits for name in inspect.signature(init).parameters}


class _Builder:
    """Builds transforms from a configuration, each with a record of all its arguments."""

    def __init__(self, source: str, size: tuple[int, int]) -> None:
        self.library = _import_albumentations()
        self.source, self.size = source, size
        self.count = 0

    def build(self, node: Any, where: str, depth: int = 0) -> tuple[Any, dict[str, Any]]:
        """Returns a transform and its record, from which the same transform can be built again."""
        self.count += 1
        if depth > _MAX_DEPTH or self.count > _MAX_TRANSFORMS:
            raise AugmentationError(f'{self.source} nests deeper than {_MAX_DEPTH}, or has more than {_MAX_TRANSFORMS} '
                                    'transforms: shorten it')
        name, arguments = find_node(node, where)
        where = f'{where}, {name}'
        kind = getattr(self.library, name)
        if name in COMPOSITIONS:
            return self._compose(kind, name, arguments, where, depth)
        known = set(inspect.signature(kind.__init__).parameters) - {'self'}
        if isinstance(node, dict) and CLASS in node:  # albumentations also writes arguments of the parent class only
            arguments = {key: value for key, value in arguments.items() if key in known or key not in _inherited(kind)}
        self._check_names(name, arguments, known, where)
        values = {key: self._value(key, value, where) for key, value in arguments.items()}
        if 'InitSchema' in vars(next(each for each in kind.__mro__ if '__init__' in vars(each))):
            values['strict'] = True  # else some invalid values only cause a warning
        built = self._make(kind, values, where)
        record = {key: value for key, value in _plain(built.to_dict_private()).items() if key in known or key == CLASS}
        record.update({key: INPUT for key, value in arguments.items() if value == INPUT})
        return built, record

    def _compose(self, kind: Any, name: str, arguments: dict[str, Any], where: str, depth: int,
                 ) -> tuple[Any, dict[str, Any]]:
        idle = {key for key, values in _IDLE.items() if name == 'Compose' and arguments.get(key, values[0]) in values}
        arguments = {key: value for key, value in arguments.items() if key not in idle}
        self._check_names(name, arguments, COMPOSITIONS[name], where)
        nodes = arguments.get('transforms')
        if not isinstance(nodes, list) or not nodes:
            raise AugmentationError(f'{where}: transforms is {nodes!r}: list one transform or more')
        parts = [self.build(each, f'{where}, place {place}', depth + 1) for place, each in enumerate(nodes, 1)]
        others = {key: value for key, value in arguments.items() if key != 'transforms'}
        for key, value in others.items():
            right: Any = {'p': (int, float), 'n': int, 'replace': bool}[key]
            if not isinstance(value, right) or isinstance(value, bool) != (key == 'replace') or key == 'p' and not \
                    0 <= value <= 1 or key == 'n' and (value < 1 or value > len(nodes) and not others.get('replace')):
                raise AugmentationError(f'{where}: {key}={value!r} is out of range')
        if name == 'OneOrOther' and len(nodes) != 2:
            raise AugmentationError(f'{where}: it takes 2 transforms, not {len(nodes)}')
        if name == 'OneOf' and not any(part.p for part, _ in parts):
            raise AugmentationError(f'{where}: all of its transforms have p=0: give one of them a larger p')
        built = self._make(kind, {**others, 'transforms': [part for part, _ in parts]}, where)
        record = {CLASS: name, 'p': built.p, **others, 'transforms': [record for _, record in parts]}
        if 'n' in COMPOSITIONS[name]:
            record.update(n=built.n, replace=built.replace)
        return built, record

    def _check_names(self, name: str, arguments: dict[str, Any], known: Any, where: str) -> None:
        for key in arguments:
            if key not in known:
                raise AugmentationError(f'{where}: {name} has no argument {key!r}: {nearest(key, known)}')

    def _value(self, key: str, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {name: self._value(name, item, where) for name, item in value.items()}
        if isinstance(value, str) and key in _NAMED:
            if value not in _NAMED[key]:
                raise AugmentationError(f'{where}: {key}={value!r} is unknown: {nearest(value, _NAMED[key])}')
            return _NAMED[key][value]
        if value == INPUT:
            value = _input_value(key, self.size)
            if value is None:
                raise AugmentationError(f"{where}: {key} cannot be '{INPUT}': give a value")
        return value

    def _make(self, kind: Any, arguments: dict[str, Any], where: str) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            try:
                built = kind(**arguments)
            except Exception as error:  # each transform has its own errors for invalid values
                raise AugmentationError(f'{where} cannot be built: {" ".join(str(error).split())}') from error
        for warning in caught:
            _warn_once(f'{where}: {warning.message}')
        return built


class Pipeline:
    """An augmentation pipeline, read from a file or a preset and checked.

    A file contains a list of transforms, or `transforms` with that list and `p` with the probability of the pipeline.
    Files written by albumentations (`albumentations.save`) and records of runs can be read as well. As a size, `input`
    stands for the input size of the network. See docs/augmentation.md.

    Args:
        source: Name of a preset, or path of a .yaml, .yml or .json file.

    Attributes:
        source: Name or path that the pipeline was read from.
        record: All transforms with all their arguments, and the albumentations version. Saved as JSON, it can be read
            as a pipeline.

    Raises:
        AugmentationError: The file is missing or malformed, or contains an unknown transform or argument.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._where = f'augmentation {source!r}'
        config = read_config(source)
        if isinstance(config, dict) and 'transform' in config and set(config) <= {'__version__', 'transform'}:
            self._check_version(config.get('__version__'))
            config = config['transform']
        if isinstance(config, list):
            config = {'transforms': config}
        if isinstance(config, dict) and CLASS not in config and 'transforms' in config:
            config = {'Compose': config}
        if find_node(config, self._where)[0] != 'Compose':
            config = {'Compose': {'transforms': [config]}}
        self._config = config
        _, tree = _Builder(source, (224, 224)).build(config, self._where)
        self.record: dict[str, object] = {
            '__version__': importlib.metadata.version('albumentations'), 'transform': tree}

    def _check_version(self, version: object) -> None:
        here = importlib.metadata.version('albumentations')
        if version is not None and version != here:
            _warn_once(f'{self._where} was written by albumentations {version}, this is {here}.')

    def build(
            self,
            size: tuple[int, int, int],
            normalization: tuple[Sequence[float], Sequence[float]] | None = None,
            error: type[Exception] = AugmentationError,
    ) -> 'Augmentation':
        """Builds the pipeline for an input size.

        Args:
            size: (channels, height, width) of the images to return.
            normalization: Means and standard deviations for images in 0..1; None to leave normalization to timm's
                prefetcher.
            error: Class of errors that are raised when an image cannot be augmented.

        Raises:
            AugmentationError: An argument does not fit this size.
        """
        compose, _ = _Builder(self.source, (size[1], size[2])).build(self._config, self._where)
        return Augmentation(compose, size, normalization, self._where, error)


class Augmentation:
    """Transforms a PIL image to a tensor `(channels, height, width)`: uint8, or float32 if normalized.

    The random numbers depend only on the seed set last; without a seed, albumentations' own generators are used.

    Args:
        compose: albumentations pipeline.
        size: (channels, height, width) of the images to return.
        normalization: Means and standard deviations for images in 0..1, None for uint8.
        name: Name of the pipeline, for messages.
        error: Class of errors to raise.
    """

    def __init__(
            self,
            compose: Any,
            size: tuple[int, int, int],
            normalization: tuple[Sequence[float], Sequence[float]] | None = None,
            name: str = 'augmentation',
            error: type[Exception] = AugmentationError,
    ) -> None:
        self.compose, self.size, self.name, self.error = compose, tuple(size), name, error
        self._scale: tuple[torch.Tensor, torch.Tensor] | None = None
        if normalization is not None:
            mean, std = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) * 255 for each in normalization)
            self._scale = mean.float(), std.float()
        self._process = 0

    def set_random_seed(self, seed: int) -> None:
        """Seeds the random numbers that all transforms share.

        albumentations' own method gives each transform a separate generator with the same seed, so that transforms with
        equal probability are applied either all or not at all.
        """
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))  # noqa: S311

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Augments an image.

        Raises:
            AugmentationError: The image does not have 8 bits per channel, a transform fails, or the result has the
                wrong size or dtype.
        """
        if self._process != os.getpid():
            import cv2

            cv2.setNumThreads(0)  # workers already use all cores, and threads do not survive a fork
            self._process = os.getpid()
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise self.error(f'{self.name} needs images with 8 bits per channel, got PIL mode {image.mode!r}: set '
                             '--input-img-mode RGB or L')
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        try:
            result = self.compose(image=pixels)['image']
        except Exception as error:  # each transform has its own errors
            raise self.error(f'{self.name} fails on an image of {image.height} x {image.width} pixels: '
                             f'{" ".join(str(error).split())}') from error
        if result.ndim == 2:
            result = result[..., None]
        if result.dtype != np.uint8:
            raise self.error(f'{self.name} returns {result.dtype} images: it must return uint8')
        if (result.shape[2], *result.shape[:2]) != self.size:
            channels, height, width = self.size
            raise self.error(
                f'{self.name} made {result.shape[0]} x {result.shape[1]} pixels in {result.shape[2]} channels of an '
                f'image of {image.height} x {image.width}, the network takes {height} x {width} in {channels}: end it '
                f'with RandomResizedCrop: {{size: {INPUT}}} or Resize: {{height: {INPUT}, width: {INPUT}}}')
        tensor = torch.from_numpy(np.array(result.transpose(2, 0, 1), order='C'))  # a copy: mixing writes into it
        if self._scale is None:
            return tensor
        mean, std = self._scale
        return (tensor.float() - mean) / std
