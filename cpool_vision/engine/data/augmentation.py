"""`--aug-config`: runs an albumentations pipeline in the training loader; a resumed run must use the same one."""
import json
import logging
from collections.abc import Mapping

from cpool_vision.data.augment import AugmentationError, Pipeline
from cpool_vision.errors import ConfigError

from ..settings.limits import flag_name
from ..settings.shared import InputConfig, settings_of
from ..settings.train import AugmentSettings, LoaderSettings
from .keyed import DrawnSeeds, KeyedDataset, WithTransform, kept_generators
from .sampling import BatchKey

_logger = logging.getLogger(__name__)
RECORD = 'augmentation.json'
KEY = 'aug_pipeline'  # in the settings of a checkpoint
# flags that have no counterpart in a user's pipeline, and the value that turns each off
_EXCLUDED = {
    'aa': None, 'aug_splits': 0, 'no_aug': False, 'naflex_loader': False, 'train_crop_mode': None, 'vflip': 0.,
    'color_jitter_prob': None, 'grayscale_prob': None, 'gaussian_blur_prob': None}
_IDLE = ('scale', 'ratio', 'hflip', 'color_jitter', 'train_interpolation')


def open_pipeline(settings: LoaderSettings) -> Pipeline | None:
    """Reads the pipeline of `--aug-config`; returns None if the flag is not set.

    Raises:
        ConfigError: The pipeline is invalid (see `Pipeline`), or another flag conflicts with it.
    """
    if not settings.aug_config:
        return None
    for name, off in _EXCLUDED.items():
        if getattr(settings, name) != off:
            flag = flag_name(name)
            raise ConfigError(f'--aug-config {settings.aug_config} replaces {flag}: drop one of the two')
    if settings.no_prefetcher and settings.reprob:
        raise ConfigError('without the prefetcher, --aug-config replaces --reprob: drop one of the two, or put Erasing '
                          'into the pipeline')
    try:
        return Pipeline(settings.aug_config)
    except AugmentationError as error:
        raise ConfigError(f'--aug-config: {error}') from error


def describe_pipeline(settings: LoaderSettings) -> dict[str, object] | None:
    """Returns a record of the `--aug-config` pipeline, or None if the flag is not set.

    The record lists every transform with all its arguments, and the albumentations version. Warns about flags of
    timm's transforms that have no effect with a pipeline.

    Raises:
        ConfigError: See `open_pipeline`.
    """
    pipeline = open_pipeline(settings)
    if pipeline is None:
        return None
    defaults = AugmentSettings()
    idle = [name for name in _IDLE if getattr(settings, name) != getattr(defaults, name)]
    if idle:
        _logger.warning("--aug-config %s replaces timm's transforms. Ignored: %s.", settings.aug_config,
                        ', '.join(map(flag_name, idle)))
    return pipeline.record


def use_pipeline(settings: LoaderSettings, data_config: InputConfig, pipeline: Pipeline,
                 dataset: KeyedDataset | WithTransform) -> None:
    """Replaces timm's transforms with a pipeline, one instance per input size.

    Images come out as uint8 for timm's prefetcher, or normalized without it. An image that the pipeline fails on
    raises `ConfigError`.

    Args:
        settings: Flags of the training loader.
        data_config: Input size, mean and standard deviation.
        pipeline: Result of `open_pipeline`.
        dataset: Dataset of a timm loader, possibly wrapped in a `KeyedDataset`.

    Raises:
        ConfigError: The pipeline cannot be built for an input size.
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


def try_pipeline(settings: LoaderSettings, dataset: object) -> None:
    """Augments one image per input size, so that a wrong pipeline fails before training; skips streamed datasets.

    Raises:
        ConfigError: The pipeline fails, or returns an image of the wrong size.
    """
    if not isinstance(dataset, KeyedDataset):
        return
    sizes = settings.train_img_sizes
    with kept_generators():
        for choice in range(len(sizes)) if sizes else [None]:
            dataset.__getitems__(BatchKey(0, 0, (0,), (0,), choice))


def record_text(record: Mapping[str, object] | None) -> str | None:
    """Returns a pipeline's record as JSON, which `--aug-config` can read back."""
    return None if record is None else json.dumps(record, indent=1) + '\n'


def _difference(former: object, now: object, path: str = '') -> str:
    """Describes the first difference between two records."""
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
    return f'{path.removeprefix("transform ")} was {_abridged(former)}, now {_abridged(now)}'


def _abridged(value: object) -> object:
    """Class name of a transform's record, or of each in a list; other values as they are."""
    if isinstance(value, Mapping):
        return value.get('__class_fullname__', value)
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return [each.get('__class_fullname__') for each in value]
    return value


def check_same_pipeline(content: Mapping[str, object], path: str, record: Mapping[str, object] | None, refuse: bool,
                        ) -> None:
    """Checks that a run is resumed with the augmentation pipeline it was trained with.

    Checkpoints written by timm do not record one and always pass.

    Args:
        content: Content of the checkpoint.
        path: Its path, for messages.
        record: Record of this run's pipeline, or None for timm's transforms.
        refuse: Raise an error if the pipelines differ, instead of a warning.

    Raises:
        ConfigError: The pipelines differ and `refuse` is set.
    """
    settings = settings_of(content)
    if KEY not in settings or settings[KEY] == record:
        return
    former = settings[KEY]
    if former is None or record is None:
        names = ["timm's transforms" if each is None else 'an albumentations pipeline' for each in (former, record)]
        what = f'it was {names[0]}, now {names[1]}'
    else:
        what = _difference(former, record)
    if refuse:
        raise ConfigError(f'--resume {path!r} was trained with a different --aug-config: {what}. Use the one of the '
                          f'previous run ({RECORD} in its folder), or start a new run')
    _logger.warning('%s was trained with a different --aug-config: %s.', path, what)
