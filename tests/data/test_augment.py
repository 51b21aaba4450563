"""albumentations pipelines: what files may say, and images that depend on the seed alone."""
import json
import pathlib
import pickle
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cpool_vision.data.augment import Augmentation, AugmentationError, Pipeline
from cpool_vision.data.augment_config import COMPOSITIONS, REFUSED, TRANSFORMS, list_presets, nearest, read_config

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SIZE = 3, 24, 24
NEEDED = {  # arguments without a default, or whose default does nothing or is made for larger images
    'CenterCrop': {'height': 20, 'width': 20}, 'RandomCrop': {'height': 20, 'width': 20},
    'Crop': {'x_max': 20, 'y_max': 20}, 'CropAndPad': {'px': 3}, 'Resize': {'height': 20, 'width': 30},
    'GridElasticDeform': {'num_grid_xy': [4, 4], 'magnitude': 5}, 'Pad': {'padding': 3},
    'PadIfNeeded': {'min_height': 60, 'min_width': 60}, 'LongestMaxSize': {'max_size': 20},
    'SmallestMaxSize': {'max_size': 20}, 'RandomResizedCrop': {'size': [20, 20]},
    'RandomSizedCrop': {'min_max_height': [10, 20], 'size': [20, 20]}, 'Affine': {'rotate': [-30, 30]},
    'ImageCompression': {'quality_range': [20, 40]}, 'Spatter': {'cutout_threshold': 0.3},
    'Superpixels': {'p_replace': 0.5}, 'Downscale': {'scale_range': [0.3, 0.6]},
    'XYMasking': {'num_masks_x': [2, 3], 'mask_x_length': [3, 5]}, 'RandomSunFlare': {'src_radius': 10},
    'ElasticTransform': {'alpha': 20, 'sigma': 3}, 'RandomGravel': {'gravel_roi': [0.0, 0.0, 1.0, 1.0]},
}


def picture(height: int = 40, width: int = 52, channels: int = 3) -> Image.Image:
    """A smooth image with noise."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width]
    base = np.stack([120 + 100 * np.sin(x / (3 + c) + y / 5) for c in range(channels)], -1)
    pixels = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Any:
    """Writes a pipeline and returns its path."""
    def write(content: Any, name: str = 'aug.yaml') -> str:
        text = content if isinstance(content, str) else json.dumps(content)  # JSON is YAML
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


def draw(augmentation: Augmentation, seeds: Any, image: Image.Image | None = None) -> list[torch.Tensor]:
    image = image or picture()
    drawn = []
    for seed in seeds:
        augmentation.set_random_seed(seed)
        drawn.append(augmentation(image))
    return drawn


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_there_are_presets() -> None:
    assert {'cifar', 'imagenet', 'light', 'strong'} <= set(list_presets())


@pytest.mark.parametrize('name', list_presets())
@pytest.mark.parametrize('size', [SIZE, (3, 40, 56)])
def test_presets_give_images_that_depend_on_the_seed_alone(name: str, size: tuple[int, int, int]) -> None:
    pipeline = Pipeline(name)
    one, two = pipeline.build(size), pickle.loads(pickle.dumps(pipeline.build(size)))  # noqa: S301
    drawn = draw(one, range(12))
    assert {(tuple(image.shape), image.dtype, image.is_contiguous()) for image in drawn} == {(size, torch.uint8, True)}
    assert len({image.numpy().tobytes() for image in drawn}) > 6
    two(picture())
    assert same(draw(two, range(12)), drawn) and same(draw(one, reversed(range(12))), drawn[::-1])


def test_without_a_seed_the_images_are_not_the_same() -> None:
    one, two = (Pipeline('strong').build(SIZE) for _ in range(2))
    assert not same([one(picture()) for _ in range(4)], [two(picture()) for _ in range(4)])


@pytest.mark.parametrize('name', sorted(TRANSFORMS))
def test_each_transform_is_seeded_and_its_record_makes_the_same(write: Any, name: str) -> None:
    p = {} if name in ('Resize', 'D4') else {'p': 1.0}
    content = [{name: {**NEEDED.get(name, {}), **p}}, {'Resize': {'height': 'input', 'width': 'input'}}]
    pipeline = Pipeline(write(content))
    again = Pipeline(write(pipeline.record, 'record.json'))
    assert again.record == pipeline.record == json.loads(json.dumps(pipeline.record))
    drawn = draw(pipeline.build(SIZE), range(4))
    assert drawn[0].shape == SIZE and same(draw(again.build(SIZE), range(4)), drawn)
    plain = draw(Pipeline(write([content[-1]], 'plain.yaml')).build(SIZE), range(4))
    assert same(drawn, plain) == (name == 'NoOp') or name in ('LongestMaxSize', 'SmallestMaxSize')


def together(seeded: Any) -> Counter[tuple[bool, bool]]:
    """How often a pair of flips of probability 1/2 falls together."""
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    seen: Counter[tuple[bool, bool]] = Counter()
    for seed in range(400):
        seeded.set_random_seed(seed)
        first = int((seeded(image) if isinstance(seeded, Augmentation) else torch.from_numpy(
            seeded(image=np.array(image)[..., None])['image'])).flatten()[0])
        seen[bool(first & 1), bool(first & 2)] += 1
    return seen


def test_transforms_draw_independently_of_each_other(write: Any) -> None:
    built = Pipeline(write(['HorizontalFlip', 'VerticalFlip'])).build((1, 2, 2))
    assert min(together(built).values()) > 60 and len(together(built)) == 4
    assert len(together(built.compose)) == 2  # what is repaired


def test_compositions(write: Any) -> None:
    flips = ['HorizontalFlip', {'VerticalFlip': {'p': 1}}]
    content = {'p': 0.9, 'transforms': [
        {'Resize': {'height': 'input', 'width': 'input'}}, {'OneOf': flips}, {'SomeOf': {'transforms': flips, 'n': 2}},
        {'RandomOrder': {'transforms': flips, 'n': 1, 'p': 0.5}}, {'Sequential': {'transforms': flips, 'p': 0.5}},
        {'OneOrOther': flips}, {'Compose': flips}]}
    pipeline = Pipeline(write(content))
    assert {part['__class_fullname__'] for part in pipeline.record['transform']['transforms']} - TRANSFORMS == set(
        COMPOSITIONS)
    assert pipeline.record['transform']['p'] == 0.9
    again = Pipeline(write(pipeline.record, 'again.json'))
    assert again.record == pipeline.record
    image = picture(24, 24)
    assert same(draw(pipeline.build(SIZE), range(20), image), draw(again.build(SIZE), range(20), image))


def test_files_of_albumentations_are_read(tmp_path: pathlib.Path) -> None:
    import albumentations

    compose = albumentations.Compose([
        albumentations.RandomResizedCrop((24, 24), scale=(0.3, 1)), albumentations.OneOf([
            albumentations.Blur(), albumentations.Affine(rotate=(-20, 20))])])
    for ending in ('json', 'yaml'):
        path = str(tmp_path / f'saved.{ending}')
        albumentations.save(compose, path, data_format=ending)
        drawn = draw(Pipeline(path).build(SIZE), range(8))
        assert same(drawn, draw(Augmentation(compose, SIZE), range(8))) and not torch.equal(*drawn[:2])


def test_the_short_forms_say_the_same(write: Any) -> None:
    forms = ['HorizontalFlip', {'HorizontalFlip': None}, ['HorizontalFlip'], [{'HorizontalFlip': {}}],
             {'transforms': ['HorizontalFlip']}, {'Compose': ['HorizontalFlip']}, {'transform': 'HorizontalFlip'},
             {'__class_fullname__': 'HorizontalFlip'},
             {'__class_fullname__': 'albumentations.augmentations.geometric.flip.HorizontalFlip'}]
    records = [Pipeline(write(form)).record for form in forms]
    assert all(record == records[0] for record in records)


def test_names_of_opencv_constants(write: Any) -> None:
    tree = Pipeline(write([{'Affine': {'interpolation': 'cubic', 'border_mode': 'reflect_101'}}, {
        'Downscale': {'interpolation_pair': {'upscale': 'linear', 'downscale': 'area'}}}])).record['transform']
    affine, downscale = tree['transforms']
    assert (affine['interpolation'], affine['border_mode']) == (2, 4)
    assert downscale['interpolation_pair'] == {'upscale': 1, 'downscale': 3}


FLIP = {'HorizontalFlip': {'p': 0.5}}
DEEP: Any = 'HorizontalFlip'
for _ in range(12):
    DEEP = {'Sequential': [DEEP]}


@pytest.mark.parametrize('content, words', [
    ([{'HorizontalFlp': {}}], "Compose, place 1: unknown transform 'HorizontalFlp': did you mean HorizontalFlip"),
    ([FLIP, {'OneOf': [FLIP, {'blur': {}}]}], "place 2, OneOf, place 2: unknown transform 'blur': did you mean Blur"),
    ([{'RandomResizedCrop': {'size': 'input', 'scael': [0.1, 1]}}], "no argument 'scael': did you mean scale"),
    ([{'OneOf': {'transforms': [FLIP], 'prob': 1}}], "OneOf has no argument 'prob': choose from p, transforms"),
    ([{'HorizontalFlip': {'p': 1.5}}], 'HorizontalFlip cannot be built.*less than or equal to 1'),
    ([{'HorizontalFlip': {'p': 'often'}}], 'HorizontalFlip cannot be built.*valid number'),
    ([{'RandomResizedCrop': {}}], 'RandomResizedCrop cannot be built.*size'),
    ([{'RandomResizedCrop': {'size': 'input', 'scale': 'input'}}], "scale cannot be 'input'"),
    ([{'Affine': {'interpolation': 'cubist'}}], "interpolation='cubist' is unknown: did you mean cubic"),
    ([{'Normalize': {}}], 'Normalize cannot be used here: images are normalized.*remove it'),
    (['ToTensorV2'], 'ToTensorV2 cannot be used here'), (['FDA'], 'FDA.*other inputs'),
    (['Lambda'], 'Lambda.*runs code'), ([], r'transforms is \[\]: list one'),
    ('', 'contains None'), ('7', 'contains 7'),
    ([{'OneOf': []}], 'OneOf: transforms is'), ([{'OneOf': {'p': 1}}], 'OneOf: transforms is None'),
    ([{'OneOf': {'transforms': [FLIP], 'p': 2}}], 'p=2 is out of range'),
    ([{'SomeOf': {'transforms': [FLIP], 'n': 2}}], 'n=2 is out of range'),
    ([{'SomeOf': {'transforms': [FLIP], 'replace': 1}}], 'replace=1 is out of range'),
    ([{'OneOrOther': [FLIP]}], 'takes 2 transforms, not 1'),
    ([{'OneOf': [{'HorizontalFlip': {'p': 0}}]}], 'all of its transforms have p=0'),
    ([{'HorizontalFlip': 0.5}], 'write one transform as NAME'),
    ([{'HorizontalFlip': {}, 'Blur': {}}], 'contains 2 keys'),
    ([{'Compose': {'transforms': [FLIP], 'bbox_params': {'format': 'yolo'}}}], "no argument 'bbox_params'"),
    ([DEEP], 'nests deeper'), ([FLIP] * 250, 'more than 200'), ('- &a [*a]', 'refers to a node that contains it'),
    ('- {', 'not valid YAML'), ([{'Blur': {1: 2}}], r'no argument|NAME: \{ARGUMENT: VALUE\}'),
])
def test_wrong_pipelines(write: Any, content: Any, words: str) -> None:
    with pytest.raises(AugmentationError, match=words):
        Pipeline(write(content))


@pytest.mark.parametrize('source, words', [
    ('ligth', "no augmentation preset 'ligth': did you mean light"), ('/none/a.yaml', 'cannot be read.*check the path'),
    ('a.txt', 'must end in .yaml'), ('/none/light', 'must end in .yaml'), ('..', 'must end in|no augmentation preset'),
])
def test_wrong_sources(source: str, words: str) -> None:
    with pytest.raises(AugmentationError, match=words):
        Pipeline(source)


def test_large_and_broken_files(write: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AugmentationError, match='larger than'):
        read_config(write('#' * (2 << 20)))
    (tmp_path / 'a.json').write_bytes(b'\xff{')
    with pytest.raises(AugmentationError, match='not valid JSON'):
        read_config(str(tmp_path / 'a.json'))
    with pytest.raises(AugmentationError, match='not valid JSON'):
        read_config(write('[' * 100_000, 'deep.json'))


@pytest.mark.parametrize('name, text', [
    ('a.yaml', '!!python/object/apply:os.mkdir ["{}"]'),
    ('b.yaml', '- !!python/object/apply:os.mkdir ["{}"]'),
    ('c.yaml', '- HorizontalFlip: {{p: !!python/object/apply:os.mkdir ["{}"]}}'),
    ('d.json', '{{"transform": {{"__class_fullname__": "os.mkdir", "path": "{}"}}}}'),
    ('e.json', '[{{"__class_fullname__": "albumentations.core.composition.os.mkdir", "path": "{}"}}]'),
    ('f.json', '[{{"__class_fullname__": "Lambda", "image": "{}"}}]'),
    ('g.yaml', '- FDA: {{reference_images: ["{}"], read_fn: os.mkdir}}'),
    ('h.yaml', '- os.mkdir: {{path: "{}"}}'),
    ('i.yaml', '- __init__: {{path: "{}"}}'),
    ('j.json', '[{{"__class_fullname__": ["os.mkdir"], "path": "{}"}}]'),
    ('k.yaml', '- HorizontalFlip: {{__reduce__: "{}"}}'),
])
def test_nothing_in_a_file_runs(write: Any, tmp_path: pathlib.Path, name: str, text: str) -> None:
    flag = tmp_path / 'executed'
    with pytest.raises(AugmentationError):
        Pipeline(write(text.format(flag), name))
    assert not flag.exists()


def test_the_payload_would_run_in_a_careless_loader(tmp_path: pathlib.Path) -> None:
    yaml.unsafe_load(f'- HorizontalFlip: {{p: !!python/object/apply:os.mkdir ["{tmp_path / "x"}"]}}')
    assert (tmp_path / 'x').is_dir()


def test_errors_on_images(write: Any) -> None:
    flip = Pipeline(write(['HorizontalFlip'])).build(SIZE)
    assert flip(picture(24, 24)).shape == SIZE
    with pytest.raises(AugmentationError, match=r'made 40 x 52 pixels in 3 channels of an image of 40 x 52.*24 x 24'):
        flip(picture())
    with pytest.raises(AugmentationError, match='8 bits per channel, got PIL mode'):
        flip(Image.fromarray(np.zeros((24, 24), np.float32)))
    with pytest.raises(RuntimeError, match='fails on an image of 40 x 52 pixels'):
        Pipeline(write([{'RandomCrop': {'height': 90, 'width': 90}}])).build(SIZE, error=RuntimeError)(picture())
    with pytest.raises(AugmentationError, match='in 1 channels'):
        flip(picture(24, 24, 1))


def test_one_channel() -> None:
    for name in ('light', 'cifar'):
        assert {tuple(x.shape) for x in draw(Pipeline(name).build((1, 24, 24)), range(3), picture(30, 30, 1))} == {
            (1, 24, 24)}


def test_normalization(write: Any) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pipeline = Pipeline('light')
    raw, normal = pipeline.build(SIZE), pipeline.build(SIZE, (mean, std))
    for pixels, values in zip(draw(raw, range(3)), draw(normal, range(3)), strict=True):
        wanted = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)


def test_images_own_their_memory(write: Any) -> None:
    image = picture(24, 24)
    before = np.asarray(image).copy()
    Pipeline(write([{'HorizontalFlip': {'p': 0}}])).build(SIZE)(image).zero_()
    assert np.array_equal(np.asarray(image), before)


def test_opencv_works_in_one_thread() -> None:
    import cv2

    cv2.setNumThreads(2)
    Pipeline('light').build(SIZE)(picture())
    assert cv2.getNumThreads() == 1


def test_warnings_of_transforms_are_logged(write: Any, caplog: pytest.LogCaptureFixture,
                                           recwarn: pytest.WarningsRecorder) -> None:
    Pipeline(write(['ShiftScaleRotate']))
    assert 'place 1, ShiftScaleRotate: ' in caplog.text and not len(recwarn)
    Pipeline(write({'__version__': '1.4.0', 'transform': {'__class_fullname__': 'HorizontalFlip', 'p': 1}}))
    assert 'was written by albumentations 1.4.0' in caplog.text


def test_another_release_of_albumentations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('importlib.metadata.version', lambda name: '3.0.1')
    with pytest.raises(AugmentationError, match='albumentations 3.0.1 is installed.*pip install'):
        Pipeline('light')


def test_missing_albumentations_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'albumentations', None)
    with pytest.raises(AugmentationError, match='cannot be imported.*pip install albumentations==2.0.8'):
        Pipeline('light')


def test_lists_are_disjoint_and_complete() -> None:
    import albumentations

    assert not TRANSFORMS & set(REFUSED)
    known = {name for name, kind in vars(albumentations).items()
             if isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)}
    spectra = {'FrequencyMasking', 'TimeMasking', 'TimeReverse'}
    bases = {'BasicTransform', 'DualTransform', 'ImageOnlyTransform', 'Transform3D', 'CubicSymmetry'}
    assert TRANSFORMS <= known
    assert {name for name in known - TRANSFORMS - set(REFUSED) if not name.endswith('3D')} == (spectra | bases) - {
        'Transform3D'}


def test_nearest() -> None:
    assert nearest('RESIZE', ['Resize', 'Blur']) == 'did you mean Resize?'
    assert nearest('x', ['Resize', 'Blur']) == 'choose from Blur, Resize'
