"""Whose data: a run goes on with those that it began with, and labels mean the classes that they meant."""
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from resume_tools import break_off

from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data.fingerprint import compare_classes, fingerprint
from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.model import create_eval_model
from cpool_vision.engine.validate.run import validate
from cpool_vision.errors import ConfigError, DatasetError, UnknownModelError

VALIDATE = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0', '--device', 'cpu', '-b', '8']


@pytest.fixture
def copied(image_root: str, tmp_path: pathlib.Path) -> pathlib.Path:
    """The image folder, to be changed."""
    shutil.copytree(image_root, tmp_path / 'images')
    return tmp_path / 'images'


def rename(root: pathlib.Path) -> None:
    os.rename(root / 'train' / 'dog', root / 'train' / 'ant')
    os.rename(root / 'validation' / 'dog', root / 'validation' / 'ant')


def add_image(root: pathlib.Path) -> None:
    shutil.copy(root / 'train' / 'cat' / '0.png', root / 'train' / 'cat' / '9.png')


def replace_image(root: pathlib.Path) -> None:
    Image.new('RGB', (16, 16)).save(root / 'train' / 'owl' / '3.png')


CHANGES = {
    'classes': (rename, r"lacks 'dog', also has 'ant', maps 'cat' to class 1 instead of 0"),
    'images': (add_image, 'it had 24 images and now has 25'),
    'content': (replace_image, 'file names, sizes or labels differ'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_other_data_are_refused_inside_an_epoch_and_told_between_epochs(
        name: str, copied: pathlib.Path, run_train: Callable[..., Any], tmp_path: pathlib.Path,
        caplog: pytest.LogCaptureFixture) -> None:
    flags = ['--data-dir', str(copied), '--recovery-interval', '1', '--resume', 'auto', '--experiment']
    break_off(lambda: run_train(*flags, 'inside'), 2)
    break_off(lambda: run_train(*flags, 'between'), 4)
    os.remove(tmp_path / 'runs' / 'between' / 'recovery-1-1.pth.tar')
    change, words = CHANGES[name]
    change(copied)
    with pytest.raises(ConfigError, match=f'middle of an epoch, and the training data have changed .*{words}'):
        run_train(*flags, 'inside')
    run_train(*flags, 'between')
    assert 'The training data have changed since' in caplog.text


def test_the_same_data_elsewhere_are_the_same(copied: pathlib.Path, image_root: str, train_args: Callable[..., Any],
                                              ) -> None:
    prints = []
    for root in (image_root, str(copied)):
        prints.append(fingerprint(data.build_dataset(
            train_args('--data-dir', root), Classes(3), 'train', True, 'RGB', None)))
    assert prints[0] == prints[1] and prints[0]['images'] == 24
    assert prints[0]['classes'] == {'cat': 0, 'dog': 1, 'owl': 2}
    os.rename(copied / 'train' / 'cat' / '7.png', copied / 'train' / 'owl' / '8.png')
    other = fingerprint(data.build_dataset(
        train_args('--data-dir', str(copied)), Classes(3), 'train', True, 'RGB', None))
    assert other['classes'] == prints[0]['classes'] and other['sha256'] != prints[0]['sha256']


def test_differences_in_words() -> None:
    assert compare_classes({'a': 0, 'b': 1}, {'a': 0, 'b': 1}) == ''
    assert compare_classes({'a': 0, 'b': 1}, {'b': 0}) == "lacks 'a', maps 'b' to class 0 instead of 1"
    many = {f'c{index}': index for index in range(9)}
    assert compare_classes({}, many).endswith("'c4' and 4 more")


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_a_split_of_other_classes_is_refused_in_training(dataset: str, copied: pathlib.Path,
                                                         run_train: Callable[..., Any]) -> None:
    shutil.rmtree(copied / 'validation' / 'cat')
    with pytest.raises(DatasetError, match=r"split 'validation' lacks 'cat', maps 'dog' to class 0 instead of 1 and 1 "
                                           r"more to other classes, compared with split 'train'.*--class-map"):
        run_train('--data-dir', str(copied), '--dataset', dataset)
    if not dataset:
        (copied / 'map.txt').write_text('cat\ndog\nowl\n')
        run_train('--data-dir', str(copied), '--class-map', str(copied / 'map.txt'), '--epochs', '1')


def test_a_set_of_other_classes_is_refused_in_validation(
        copied: pathlib.Path, run_train: Callable[..., Any], validate_args: Callable[..., Any]) -> None:
    path = os.path.join(run_train('--epochs', '1')['folder'], 'last.pth.tar')
    flags = [*VALIDATE, '--data-dir', str(copied), '--checkpoint', path]
    assert validate(validate_args(*flags))['images'] == 7
    os.rename(copied / 'validation' / 'dog', copied / 'validation' / 'zebra')
    with pytest.raises(DatasetError, match=r"lacks 'dog', also has 'zebra', .*compared with the classes of the model"):
        validate(validate_args(*flags))


def test_a_model_folder_that_names_its_labels_is_measured_on_those(
        copied: pathlib.Path, tmp_path: pathlib.Path, validate_args: Callable[..., Any],
        caplog: pytest.LogCaptureFixture) -> None:
    import timm
    from timm.models import save_for_hf
    model = timm.create_model('test_resnet', num_classes=3)
    save_for_hf(model, str(tmp_path / 'm'), model_config={'label_names': ['cat', 'dog', 'owl']})
    flags = ['--model', f'local-dir:{tmp_path / "m"}', *VALIDATE[2:], '--data-dir', str(copied)]
    assert validate(validate_args(*flags))['images'] == 7
    os.rename(copied / 'validation' / 'cat', copied / 'validation' / 'pig')
    with pytest.raises(DatasetError, match=r"lacks 'cat', also has 'pig', maps 'dog' to class 0 instead of 1"):
        validate(validate_args(*flags))


@pytest.mark.parametrize('change, message', [
    ({'num_classes': -3}, 'num_classes of its config.json must be a number >= 0, got -3'),
    ({'label_names': 'abc'}, "must be a list of names, got 'abc'"),
    ({'label_names': {'0': 'cat'}}, 'must be a list of names, got {'),
    ({'label_names': ['cat', None, 'owl']}, 'must be a list of names'),
    ({'label_names': ['cat', 'dog']}, '2 label_names for num_classes 3'),
])
def test_classes_of_a_model_folder_that_make_no_sense_are_an_error(
        tmp_path: pathlib.Path, change: dict[str, Any], message: str) -> None:
    import timm
    from timm.models import save_for_hf
    save_for_hf(timm.create_model('test_resnet', num_classes=3), str(tmp_path))
    path = tmp_path / 'config.json'
    content = json.loads(path.read_text())
    content['pretrained_cfg'].update(change)
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(UnknownModelError, match=message):
        create_eval_model(f'local-dir:{tmp_path}')


SYNSETS = ('n01440764', 'n02123045', 'n07753592')  # tench, tabby, banana: 0, 281, 954


def synset_folder(root: pathlib.Path) -> str:
    for index, name in enumerate(SYNSETS):
        (root / 'val' / name).mkdir(parents=True)
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / 'val' / name / '1.png')
    return str(root)


def test_some_synsets_are_measured_under_their_own_numbers(
        tmp_path: pathlib.Path, validate_args: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    import timm
    model = timm.create_model('test_resnet', num_classes=1000)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    flags = ['--model', 'test_resnet', '--num-classes', '1000', *VALIDATE[4:], '--data-dir',
             synset_folder(tmp_path / 'data'), '--checkpoint', str(tmp_path / 'w.pth')]
    plain = validate(validate_args(*flags))
    assert 'are some of the 1000 ImageNet synsets: using --class-subset imagenet-1k' in caplog.text
    asked = validate(validate_args(*flags, '--class-subset', 'imagenet-1k'))
    assert plain['loss'] == asked['loss'] and plain['images'] == 3
    (tmp_path / 'data' / 'val' / 'other').mkdir()  # control: folders that are no synsets are numbered by name
    Image.new('RGB', (32, 32)).save(tmp_path / 'data' / 'val' / 'other' / '1.png')
    caplog.clear()
    assert validate(validate_args(*flags))['images'] == 4 and 'ImageNet synsets' not in caplog.text


def test_the_class_map_of_imagenet_needs_no_file(tmp_path: pathlib.Path, train_args: Callable[..., Any]) -> None:
    args = train_args('--data-dir', synset_folder(tmp_path), '--num-classes', '1000', '--class-map', 'imagenet-1k')
    assert [target for _, target in data.build_dataset(
        args, Classes(1000), 'validation', False, 'RGB', None)] == [0, 281, 954]
