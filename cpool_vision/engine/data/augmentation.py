"""`--aug-config`: albumentations in the training loader, and the same pipeline in a resumed run."""
import json
import logging
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from cpool_vision.data.augment import AugmentationError, Pipeline
from cpool_vision.errors import ConfigError

from ..settings.shared import InputConfig, settings_of
from ..settings.train import AugmentSettings, LoaderSettings
from .keyed import DrawnSeeds, KeyedDataset, kept_generators
from .sampling import BatchKey

_logger = logging.getLogger(__name__)
RECORD = 'augmentation.json'
KEY = 'aug_pipeline'  # among the settings in a checkpoint
# flags that ask for something which a pipeline of the user's own does not do; the value that switches each off
_EXCLUDED = {
    'aa': None, 'aug_splits': 0, 'no_aug': False, 'naflex_loader': False, 'train_crop_mode': None, 'vflip': 0.,
    'color_jitter_prob': None, 'grayscale_prob': None, 'gaussian_blur_prob': None}
_IDLE = ('scale', 'ratio', 'hflip', 'color_jitter', 'train_interpolation')


def open_pipeline(settings: LoaderSettings) -> Pipeline | None:
    """The pipeline that `--aug-config` names, None without.

    Raises:
        ConfigError: see `Pipeline`; also flags that do not go with it.
    """
    if not settings.aug_config:
        return None
    for name, off in _EXCLUDED.items():
        if getattr(settings, name) != off:
            flag = '--' + name.replace('_', '-')
            raise ConfigError(f'--aug-config {settings.aug_config} replaces {flag}: drop one of the two')
    if settings.no_prefetcher and settings.reprob:
        raise ConfigError('without the prefetcher, --aug-config replaces --reprob: drop one of the two, or put Erasing '
                          'into the pipeline')
    try:
        return Pipeline(settings.aug_config)
    except AugmentationError as error:
        raise ConfigError(f'--aug-config: {error}') from error


def describe_pipeline(settings: LoaderSettings) -> dict[str, Any] | None:
    """Every transform of `--aug-config` with all its arguments and the release of albumentations, None without.

    Flags of timm's transforms that no longer act are named in the log.

    Raises:
        ConfigError: see `open_pipeline`.
    """
    pipeline = open_pipeline(settings)
    if pipeline is None:
        return None
    usual = AugmentSettings()
    idle = [name for name in _IDLE if getattr(settings, name) != getattr(usual, name)]
    if idle:
        _logger.warning('--aug-config %s takes the place of timm\'s transforms: %s has no effect.', settings.aug_config,
                        ', '.join('--' + name.replace('_', '-') for name in idle))
    return pipeline.record


def use_pipeline(settings: LoaderSettings, data_config: InputConfig, pipeline: Pipeline, dataset: Any) -> None:
    """Puts a pipeline in the place of timm's transforms, one for each input size.

    It gives uint8 for timm's prefetcher, or normalizes where there is none; on images it raises `ConfigError`.

    Args:
        settings, data_config: the run.
        pipeline: what `open_pipeline` gave.
        dataset: the set that a loader of timm reads, or a `KeyedDataset` of it.

    Raises:
        ConfigError: the pipeline cannot be built for an input size.
    """
    normalization = (data_config['mean'], data_config['std']) if settings.no_prefetcher else None
    channels, height, width = data_config['input_size']
    sizes = [(side, side) for side in settings.train_img_sizes or ()] or [(height, width)]
    try:
        transforms = [pipeline.build((channels, *size), normalization, ConfigError) for size in sizes]
    except AugmentationError as error:
        raise ConfigError(f'--aug-config: {error}') from error
    if isinstance(dataset, KeyedDataset):
        dataset.set_transforms(transforms)
    else:
        dataset.transform = DrawnSeeds(transforms[0])


def try_pipeline(settings: LoaderSettings, dataset: Dataset[Any]) -> None:
    """Augments one image for each input size, so that a pipeline that does not fit is refused before training.

    Raises:
        ConfigError: it fails, or gives another size.
    """
    if not isinstance(dataset, KeyedDataset):
        return
    sizes = settings.train_img_sizes
    with kept_generators():
        for choice in range(len(sizes)) if sizes else [None]:
            dataset.__getitems__(BatchKey(0, 0, (0,), (0,), choice))


def record_text(record: Mapping[str, Any] | None) -> str | None:
    """What the run folder keeps of a pipeline: a file that `--aug-config` reads."""
    return None if record is None else json.dumps(record, indent=1) + '\n'


def _difference(former: Any, now: Any, path: str = '') -> str:
    """Where two records differ first."""
    if isinstance(former, Mapping) and isinstance(now, Mapping) and former.get('__class_fullname__') == now.get(
            '__class_fullname__'):
        for key in sorted({*former, *now}):
            if former.get(key) != now.get(key):
                name = former.get('__class_fullname__', '')
                return _difference(former.get(key), now.get(key), f'{path} {name} {key}'.strip())
    if isinstance(former, list) and isinstance(now, list) and len(former) == len(now):
        for place, (one, two) in enumerate(zip(former, now, strict=True), 1):
            if one != two:
                return _difference(one, two, f'{path} {place}')
    sides = [each.get('__class_fullname__', each) if isinstance(each, Mapping) else
             [part.get('__class_fullname__') for part in each] if isinstance(each, list) and each and all(
                 isinstance(part, Mapping) for part in each) else each for each in (former, now)]
    return f'{path.removeprefix("transform ")} was {sides[0]}, now {sides[1]}'


def check_same_pipeline(content: Mapping[str, Any], path: str, record: Mapping[str, Any] | None, refuse: bool) -> None:
    """Compares the pipeline with that of the run which wrote a checkpoint; timm's checkpoints name none.

    Args:
        content: the checkpoint.
        path: its file.
        record: pipeline of this run, None for timm's transforms.
        refuse: another one is an error rather than a warning.

    Raises:
        ConfigError: another pipeline, and `refuse`.
    """
    settings = settings_of(content)
    if KEY not in settings or settings[KEY] == record:
        return
    former = settings[KEY]
    if former is None or record is None:
        names = ['timm\'s transforms' if each is None else 'a pipeline of albumentations' for each in (former, record)]
        what = f'it was {names[0]}, now {names[1]}'
    else:
        what = _difference(former, record)
    if refuse:
        raise ConfigError(f'--resume {path!r} was trained with another --aug-config: {what}; use that of the '
                          f'previous run ({RECORD} in its folder), or start another run')
    _logger.warning('%s was trained with another --aug-config: %s.', path, what)
