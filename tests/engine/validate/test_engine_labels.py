"""Class subsets, folders as classes, and images with several right labels."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from cpool_vision.engine.validate.bulk import run_validation
from cpool_vision.engine.validate.labels import (
    describe_classes,
    read_class_subset,
    read_real_labels,
    read_valid_labels,
)
from cpool_vision.errors import ConfigError, DatasetError, DatasetNotFoundError

WNIDS = ImageNetInfo('imagenet-1k').label_names()


@pytest.mark.parametrize('name, classes', [
    ('imagenet-1k', 1000), ('imagenet-sketch', 1000), ('imagenet-a', 200), ('imagenet_r', 200), ('mini-imagenet', 100),
])
def test_named_subsets_map_synsets_to_outputs(name: str, classes: int) -> None:
    subset = read_class_subset(name, 1000)
    assert len(subset.valid_labels) == classes == len(subset.class_map)
    assert subset.valid_labels == sorted(subset.valid_labels)
    for folder, position in subset.class_map.items():
        assert WNIDS[subset.valid_labels[position]] == folder


@pytest.mark.parametrize('name', ['a', 'r'])
def test_named_subsets_agree_with_the_indices_of_timm(name: str) -> None:
    from importlib import resources
    text = (resources.files('timm.data') / '_info' / f'imagenet_{name}_indices.txt').read_text()
    assert read_class_subset(f'imagenet-{name}', 1000).valid_labels == [int(line) for line in text.split()]


def test_synsets_are_shown_with_their_meaning() -> None:
    assert describe_classes(['n01440764', 'cat', '7']) == ['n01440764 tench', 'cat', '7']


def test_folders_of_v2_are_numbers() -> None:
    subset = read_class_subset('imagenet-v2', 1000)
    assert [subset.class_map[str(index)] for index in (0, 2, 10, 999)] == [0, 2, 10, 999]


def test_files_of_folders(tmp_path: Path) -> None:
    path = tmp_path / 'folders.txt'
    path.write_text('red fox 7\nwolf\t2\narctic fox 7\n\n')
    subset = read_class_subset(str(path), 10)
    assert subset.valid_labels == [2, 7]
    assert subset.class_map == {'red fox': 1, 'wolf': 0, 'arctic fox': 1}
    other = tmp_path / 'folders.json'
    other.write_text(json.dumps({'red fox': 7, 'wolf': 2, 'arctic fox': 7}))
    assert read_class_subset(str(other), 10) == subset


@pytest.mark.parametrize('text, suffix, words', [
    ('fox 10', 'txt', "'fox' has no class index below 10"), ('fox', 'txt', 'FOLDER INDEX'), ('', 'txt', 'FOLDER INDEX'),
    ('fox 1\nfox 2', 'txt', "lists folder 'fox' twice"), ('{', 'json', 'cannot be read'),
    ('[1]', 'json', 'must map folder names'), ('{"fox": true}', 'json', 'no class index'),
    ('{"fox": "1"}', 'json', 'no class index'), ('{"fox": -1}', 'json', 'no class index'),
])
def test_bad_files_of_folders(tmp_path: Path, text: str, suffix: str, words: str) -> None:
    path = tmp_path / f'folders.{suffix}'
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_class_subset(str(path), 10)


def test_subsets_for_other_models_or_of_other_names() -> None:
    with pytest.raises(ConfigError, match='1000 ImageNet classes, this one has 10'):
        read_class_subset('imagenet-a', 10)
    with pytest.raises(ConfigError, match='neither a file nor one of imagenet-1k'):
        read_class_subset('imagenet-x', 1000)


def test_real_labels_go_by_number_or_by_name(tmp_path: Path) -> None:
    path = tmp_path / 'real.json'
    path.write_text(json.dumps([[3, 4], [], [1]]))
    names = [f'a/ILSVRC2012_val_0000000{index}.JPEG' for index in (3, 1, 2)]
    assert read_real_labels(str(path), names, 10) == [[1], [3, 4], []]
    for wrong in (*(f'ILSVRC2012_val_{number}.JPEG' for number in ('00000004', '00000000', '0000001')), 'a.JPEG'):
        with pytest.raises(ConfigError, match=f'no labels for {wrong!r}'):
            read_real_labels(str(path), [wrong], 10)
    with pytest.raises(ConfigError, match='4 is not a class index below 4'):
        read_real_labels(str(path), names, 4)
    path.write_text('{')
    with pytest.raises(ConfigError, match='cannot be read'):
        read_real_labels(str(path), names, 10)


def test_labels_of_imagenet_real_are_read(tmp_path: Path) -> None:
    from importlib import resources
    path = tmp_path / 'real.json'
    path.write_bytes((resources.files('timm.data') / '_info' / 'imagenet_real_labels.json').read_bytes())
    labels = read_real_labels(str(path), [f'ILSVRC2012_val_{number:08d}.JPEG' for number in range(1, 50001)], 1000)
    assert sum(map(bool, labels)) == 46837 and sum(len(each) > 1 for each in labels) == 7443


def test_valid_labels_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / 'labels').write_bytes(b'\xff\xfe\x80')
    with pytest.raises(ConfigError, match='not UTF-8 text'):
        read_valid_labels(str(tmp_path / 'labels'), 10)


# -- whole runs

@pytest.fixture
def run(validate_args: Callable[..., Any], image_root: str, tmp_path: Path) -> Callable[..., Any]:
    torch.manual_seed(0)
    path = str(tmp_path / 'weights.pth')
    torch.save(timm.create_model('test_resnet', num_classes=5).state_dict(), path)
    return lambda *flags: run_validation(validate_args(
        '--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '5', '--img-size', '32', '-j', '0', '-b',
        '4', '--device', 'cpu', '--checkpoint', path, *flags))


def test_a_subset_leaves_folders_and_outputs_out(run: Callable[..., Any], tmp_path: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    folders, everything = tmp_path / 'folders.txt', tmp_path / 'all.npz'
    folders.write_text('owl 1\ncat 4\nunicorn 2\n')
    with caplog.at_level('INFO'):
        row = run('--class-subset', str(folders), '--predictions', str(tmp_path / 'part.npz'))
    assert '4 images of 2 of its 3 classes' in caplog.text
    assert row['images'] == 4
    assert [(each['name'], each['images']) for each in row['per_class']] == [('owl', 1), ('unicorn', 0), ('cat', 3)]
    run('--predictions', str(everything))
    part, whole = np.load(tmp_path / 'part.npz'), np.load(everything)
    keep = np.array([name.split('/')[0] != 'dog' for name in whole['filename']])
    assert part['filename'].tolist() == whole['filename'][keep].tolist()
    assert part['class_index'].tolist() == [1, 2, 4]
    np.testing.assert_allclose(part['logits'], whole['logits'][keep][:, [1, 2, 4]], atol=1e-5)
    expected = whole['logits'][keep][:, [1, 2, 4]].argmax(1) == np.array([2, 2, 2, 0])
    assert row['top1'] == 100 * expected.mean()


def test_a_subset_without_images(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / 'folders.txt').write_text('unicorn 2\n')
    with pytest.raises(DatasetError, match='no folder under .* is a class of --class-subset'):
        run('--class-subset', str(tmp_path / 'folders.txt'))
    for flags in (('--valid-labels', 'x'), ('--class-map', 'x'), ('--dataset', 'cpool/shapes')):
        with pytest.raises(ConfigError, match=f'--class-subset and {flags[0]} cannot be combined'):
            run('--class-subset', 'x', *flags)


def test_corruptions_and_their_mean(run: Callable[..., Any], image_root: str, tmp_path: Path) -> None:
    root = tmp_path / 'corrupted'
    for name, severities in (('noise', (1, 2, 10)), ('blur', (1, 2))):
        for severity in severities:
            folder = root / name / str(severity)
            shutil.copytree(Path(image_root) / 'validation', folder)
            for path in folder.glob('*/*.png'):
                pixels = np.asarray(Image.open(path)).astype(int) + 12 * severity * (1 if name == 'noise' else -1)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    row = run('--corruptions', str(root), '--results-file', str(tmp_path / 'r.csv'))
    places = [(each['corruption'], each['severity']) for each in row['corruptions']]
    assert places == [('blur', '1'), ('blur', '2'), ('noise', '1'), ('noise', '2'), ('noise', '10')]
    for each in row['corruptions']:
        alone = run('--data-dir', str(root / each['corruption'] / each['severity']), '--split', '')
        assert all(each[key] == alone[key] for key in ('top1', 'nll', 'ece', 'images'))
    nll = [each['nll'] for each in row['corruptions']]
    assert len(set(nll)) == 5
    assert row['nll'] == pytest.approx((sum(nll[:2]) / 2 + sum(nll[2:]) / 3) / 2)
    assert row['images'] == 35
    top1 = [each['top1'] for each in row['corruptions']]
    assert row['corruption_means']['by_severity']['2'] == pytest.approx((top1[1] + top1[3]) / 2)
    assert row['corruption_means']['by_corruption']['noise'] == pytest.approx(sum(top1[2:]) / 3)
    lines = (tmp_path / 'r.csv').read_text().splitlines()
    assert len(lines) == 1 + 6 and 'corruption' in lines[0] and lines[-1].count('noise,10') == 1


def test_bad_folders_of_corruptions(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match='--corruptions .*none'):
        run('--corruptions', str(tmp_path / 'none'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DatasetError, match='CORRUPTION/SEVERITY/CLASS'):
        run('--corruptions', str(tmp_path / 'empty'))
    (tmp_path / 'empty' / 'noise').mkdir()
    with pytest.raises(DatasetError, match="'noise' contains no folders"):
        run('--corruptions', str(tmp_path / 'empty'))
    with pytest.raises(ConfigError, match='--corruptions and --plots cannot be combined'):
        run('--corruptions', str(tmp_path), '--plots', 'x')
