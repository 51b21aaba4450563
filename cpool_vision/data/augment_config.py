"""Augmentation pipelines in YAML or JSON: files and presets, and which albumentations transforms they may name."""
import difflib
import os
from importlib import resources
from typing import Any

import yaml

from cpool_vision.reading import read_json, read_yaml, reason

__all__ = [
    'CLASS', 'COMPOSITIONS', 'REFUSED', 'TRANSFORMS', 'AugmentationError', 'find_node', 'list_presets', 'nearest',
    'read_config',
]

_MAX_BYTES = 1 << 20
CLASS = '__class_fullname__'  # key of the files that albumentations itself writes

COMPOSITIONS: dict[str, tuple[str, ...]] = {
    'Compose': ('transforms', 'p'),
    'Sequential': ('transforms', 'p'),
    'OneOf': ('transforms', 'p'),
    'OneOrOther': ('transforms', 'p'),
    'SomeOf': ('transforms', 'n', 'replace', 'p'),
    'RandomOrder': ('transforms', 'n', 'replace', 'p'),
}

# every transform of albumentations 2.0.8 that makes a uint8 image of a uint8 image and of nothing else
TRANSFORMS = frozenset('''
    AdditiveNoise AdvancedBlur Affine AutoContrast Blur CLAHE CenterCrop ChannelDropout ChannelShuffle
    ChromaticAberration CoarseDropout ColorJitter Crop CropAndPad D4 Defocus Downscale ElasticTransform Emboss Equalize
    Erasing FancyPCA GaussNoise GaussianBlur GlassBlur GridDistortion GridDropout GridElasticDeform HEStain
    HorizontalFlip HueSaturationValue ISONoise Illumination ImageCompression InvertImg LongestMaxSize MedianBlur
    Morphological MotionBlur MultiplicativeNoise NoOp OpticalDistortion Pad PadIfNeeded Perspective PiecewiseAffine
    PixelDropout PlanckianJitter PlasmaBrightnessContrast PlasmaShadow Posterize RGBShift RandomBrightnessContrast
    RandomCrop RandomCropFromBorders RandomFog RandomGamma RandomGravel RandomGridShuffle RandomRain RandomResizedCrop
    RandomRotate90 RandomScale RandomShadow RandomSizedCrop RandomSnow RandomSunFlare RandomToneCurve Resize
    RingingOvershoot Rotate SafeRotate SaltAndPepper Sharpen ShiftScaleRotate ShotNoise SmallestMaxSize Solarize Spatter
    SquareSymmetry Superpixels ThinPlateSpline ToGray ToSepia Transpose UnsharpMask VerticalFlip XYMasking ZoomBlur
'''.split())

_FLOAT = 'images are normalized and turned into tensors after the pipeline: remove it'
_MORE = 'it needs more than the image'
REFUSED = {
    **dict.fromkeys(('FromFloat', 'Normalize', 'ToFloat', 'ToRGB', 'ToTensorV2', 'ToTensor3D'), _FLOAT),
    **dict.fromkeys((
        'AtLeastOneBBoxRandomCrop', 'BBoxSafeRandomCrop', 'ConstrainedCoarseDropout', 'CropNonEmptyMaskIfExists', 'FDA',
        'HistogramMatching', 'MaskDropout', 'Mosaic', 'OverlayElements', 'PixelDistributionAdaptation',
        'RandomCropNearBBox', 'RandomSizedBBoxSafeCrop', 'TextImage'), _MORE),
    'Lambda': 'it runs code',
}


class AugmentationError(ValueError):
    """An augmentation pipeline cannot be used: the message names file or preset, value and remedy."""


def list_presets() -> list[str]:
    """Names of the pipelines that come with the package."""
    folder = resources.files(__package__) / 'presets'
    return sorted(entry.name.removesuffix('.yaml') for entry in folder.iterdir() if entry.name.endswith('.yaml'))


def nearest(name: str, known: Any) -> str:
    """End of a message about an unknown name: the nearest known ones, or all if none is near."""
    folded = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), folded, n=3)
    if close:
        return f'did you mean {" or ".join(folded[each] for each in close)}?'
    return f'choose from {", ".join(sorted(known))}'


def read_config(source: str) -> Any:
    """Reads a preset or a YAML or JSON file into plain values; nothing in it can run code.

    Args:
        source: name of a preset, or path of a file whose name ends in .yaml, .yml or .json.

    Raises:
        AugmentationError: no such preset or file, or it is not YAML or JSON.
    """
    ending = os.path.splitext(source)[1].lower()
    if not ending and os.path.basename(source) == source:
        if source not in list_presets():
            raise AugmentationError(f'there is no augmentation preset {source!r}: {nearest(source, list_presets())} A '
                                    'file must end in .yaml, .yml or .json')
        text = (resources.files(__package__) / 'presets' / f'{source}.yaml').read_text(encoding='utf-8')
        return yaml.safe_load(text)
    if ending not in ('.yaml', '.yml', '.json'):
        raise AugmentationError(f'augmentation file {source!r} must end in .yaml, .yml or .json: rename it')
    try:
        if os.path.getsize(source) > _MAX_BYTES:
            raise AugmentationError(f'augmentation file {source!r} is larger than {_MAX_BYTES} bytes: name another one')
        return read_json(source, _MAX_BYTES) if ending == '.json' else read_yaml(source, _MAX_BYTES)
    except OSError as error:
        raise AugmentationError(f'augmentation file {source!r} cannot be read ({reason(error)}): check the path') \
            from error
    except AugmentationError:
        raise
    except ValueError as error:
        raise AugmentationError(f'augmentation file {source!r} is not valid {ending[1:].upper()} ({reason(error)}): '
                                'fix it') from error


def find_node(node: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of one transform, in any of the three forms.

    The forms are `Name`, `{Name: {argument: value}}`, and that of albumentations' own files,
    `{__class_fullname__: Name, argument: value}`.

    Args:
        node: plain values.
        where: file and place, for messages.

    Raises:
        AugmentationError: not a transform, unknown, or not to be used here.
    """
    if isinstance(node, str):
        name, arguments = node, {}
    elif isinstance(node, dict) and CLASS in node:
        name = node[CLASS]
        arguments = {key: value for key, value in node.items() if key != CLASS}
        if isinstance(name, str) and name.startswith('albumentations.'):
            name = name.rpartition('.')[2]
    elif isinstance(node, dict) and len(node) == 1:
        (name, arguments), = node.items()
        arguments = {} if arguments is None else arguments
        if name in COMPOSITIONS and isinstance(arguments, list):
            arguments = {'transforms': arguments}
    else:
        what = f'{len(node)} keys ({", ".join(map(str, node))})' if isinstance(node, dict) else repr(node)
        raise AugmentationError(f'{where} holds {what[:200]}: write one transform as NAME: {{ARGUMENT: VALUE}}')
    if not isinstance(name, str) or not isinstance(arguments, dict) or not all(isinstance(k, str) for k in arguments):
        raise AugmentationError(f'{where}, {name!r}: write one transform as NAME: {{ARGUMENT: VALUE}}')
    if name in REFUSED:
        raise AugmentationError(f'{where}: {name} cannot be part of the pipeline: {REFUSED[name]}')
    if name not in TRANSFORMS and name not in COMPOSITIONS:
        raise AugmentationError(f'{where}: unknown transform {name!r}: '
                                f'{nearest(name, [*TRANSFORMS, *COMPOSITIONS])}')
    return name, arguments
