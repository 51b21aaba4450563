"""Reads augmentation pipelines from YAML or JSON files and presets, and lists the transforms they may contain."""
import difflib
import os
from collections.abc import Collection
from importlib import resources
from typing import Any

import yaml

from cpool_vision.reading import read_json, read_yaml, reason

__all__ = [
    'CLASS', 'COMPOSITIONS', 'REFUSED', 'TRANSFORMS', 'AugmentationError', 'find_node', 'list_presets', 'nearest',
    'read_config',
]

_MAX_BYTES = 1 << 20
CLASS = '__class_fullname__'  # key of a transform's name in files written by albumentations

COMPOSITIONS: dict[str, tuple[str, ...]] = {
    'Compose': ('transforms', 'p'),
    'Sequential': ('transforms', 'p'),
    'OneOf': ('transforms', 'p'),
    'OneOrOther': ('transforms', 'p'),
    'SomeOf': ('transforms', 'n', 'replace', 'p'),
    'RandomOrder': ('transforms', 'n', 'replace', 'p'),
}

# all transforms of albumentations 2.0.8 that map a uint8 image, without other inputs, to a uint8 image
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

_FLOAT = 'images are normalized and converted to tensors after the pipeline: remove it'
_MORE = 'it needs other inputs besides the image: remove it'
REFUSED = {
    **dict.fromkeys(('FromFloat', 'Normalize', 'ToFloat', 'ToRGB', 'ToTensorV2', 'ToTensor3D'), _FLOAT),
    **dict.fromkeys((
        'AtLeastOneBBoxRandomCrop', 'BBoxSafeRandomCrop', 'ConstrainedCoarseDropout', 'CropNonEmptyMaskIfExists', 'FDA',
        'HistogramMatching', 'MaskDropout', 'Mosaic', 'OverlayElements', 'PixelDistributionAdaptation',
        'RandomCropNearBBox', 'RandomSizedBBoxSafeCrop', 'TextImage'), _MORE),
    'Lambda': 'it runs code: remove it',
}


class AugmentationError(ValueError):
    """An augmentation pipeline is invalid or fails on an image."""


def list_presets() -> list[str]:
    """Returns the names of the pipelines that come with the package."""
    folder = resources.files(__package__) / 'presets'
    return sorted(entry.name.removesuffix('.yaml') for entry in folder.iterdir() if entry.name.endswith('.yaml'))


def nearest(name: str, known: Collection[str]) -> str:
    """Returns the end of a message about an unknown name: close matches, or all known names if there are none."""
    folded = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), folded, n=3)
    if close:
        return f'did you mean {" or ".join(folded[each] for each in close)}?'
    return f'choose from {", ".join(sorted(known))}'


def read_config(source: str) -> Any:
    """Reads a preset or a YAML or JSON file into plain values, without running code.

    Args:
        source: Name of a preset, or path of a .yaml, .yml or .json file.

    Raises:
        AugmentationError: There is no such preset or file, or the file is not valid YAML or JSON.
    """
    ending = os.path.splitext(source)[1].lower()
    if not ending and os.path.basename(source) == source:
        if source not in list_presets():
            raise AugmentationError(f'there is no augmentation preset {source!r}: {nearest(source, list_presets())} '
                                    'Names of files must end in .yaml, .yml or .json')
        text = (resources.files(__package__) / 'presets' / f'{source}.yaml').read_text(encoding='utf-8')
        return yaml.safe_load(text)
    if ending not in ('.yaml', '.yml', '.json'):
        raise AugmentationError(f'augmentation file {source!r} must end in .yaml, .yml or .json: rename it')
    try:
        if os.path.getsize(source) > _MAX_BYTES:
            raise AugmentationError(f'augmentation file {source!r} is larger than {_MAX_BYTES} bytes: use another one')
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
    """Returns the name and arguments of a transform.

    A transform is written as `Name`, as `{Name: {argument: value}}` or, in files of albumentations itself, as
    `{__class_fullname__: Name, argument: value}`.

    Args:
        node: Plain values.
        where: File and position in it, for messages.

    Raises:
        AugmentationError: This is not a transform, or one that is unknown or not allowed.
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
        raise AugmentationError(f'{where} contains {what[:200]}: write one transform as NAME: {{ARGUMENT: VALUE}}')
    if not isinstance(name, str) or not isinstance(arguments, dict) or not all(isinstance(k, str) for k in arguments):
        raise AugmentationError(f'{where}, {name!r}: write one transform as NAME: {{ARGUMENT: VALUE}}')
    if name in REFUSED:
        raise AugmentationError(f'{where}: {name} cannot be used here: {REFUSED[name]}')
    if name not in TRANSFORMS and name not in COMPOSITIONS:
        raise AugmentationError(f'{where}: unknown transform {name!r}: '
                                f'{nearest(name, [*TRANSFORMS, *COMPOSITIONS])}')
    return name, arguments
