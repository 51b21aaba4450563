"""Sets with several labels per image: label files, losses, and runs from training to results."""
import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from resume_tools import break_off, rows, unequal
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.loss import (
    AsymmetricLossMultiLabel,
    BinaryCrossEntropy,
    DistributionBalancedLoss,
    TwoWayLoss,
    ZlprLoss,
)

from cpool_vision.engine.data import dataset
from cpool_vision.engine.data.label_file import LabelFileReader, read_label_file
from cpool_vision.engine.data.multi_label import Classes, MultiHot
from cpool_vision.engine.data.unreadable import UNREADABLE
from cpool_vision.engine.settings.config import read_train, read_validate
from cpool_vision.engine.settings.shared import DataSettings
from cpool_vision.engine.train import loss
from cpool_vision.engine.train.fit import train
from cpool_vision.engine.validate.bulk import run_validation
from cpool_vision.engine.validate.results import write_results
from cpool_vision.engine.validate.run import validate
from cpool_vision.errors import ConfigError, DatasetError, DatasetNotFoundError, UserError

NAMES = ('blue', 'green', 'red')
LABELS = [['red'], [], ['blue', 'red'], ['blue', 'green', 'red'], ['green'], ['blue']]
Args = Callable[..., Any]


def write_csv(path: Path, header: list[str], lines: list[list[Any]]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([header, *lines])


def labels_csv(folder: Path, labels: list[list[str]]) -> None:
    write_csv(folder / 'labels.csv', ['file_name', 'labels'],
              [[f'{index}.png', '|'.join(each)] for index, each in enumerate(labels)])


def paint(folder: Path, labels: list[list[str]], seed: int) -> None:
    """Noise with a bright channel for each label."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index, each in enumerate(labels):
        pixels = rng.integers(0, 120, (16, 16, 3))
        for name in each:
            pixels[..., 2 - NAMES.index(name)] += 110
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    labels_csv(folder, labels)


@pytest.fixture(scope='module')
def label_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with train/ (24 images) and validation/ (9 images), 16 x 16 pixels, with a labels.csv each."""
    root = tmp_path_factory.mktemp('labels')
    paint(root / 'train', LABELS * 4, 0)
    paint(root / 'validation', (LABELS * 2)[:9], 1)
    return str(root)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folder of six images with the labels of `LABELS`, and no file of them."""
    paint(tmp_path / 'pictures', LABELS, 0)
    (tmp_path / 'pictures/labels.csv').unlink()
    return tmp_path / 'pictures'


@pytest.fixture
def flags(label_root: str, base_flags: list[str]) -> list[str]:
    return ['--data-dir', label_root, *base_flags[2:], '--task', 'multi_label']


@pytest.fixture
def run(flags: list[str]) -> Callable[..., dict[str, Any]]:
    return lambda *more: train(read_train([*flags, *more]))


def numbers(labels: list[list[str]]) -> list[list[int]]:
    return [[NAMES.index(name) for name in each] for each in labels]


def lines_of(rows: list[dict[str, Any]]) -> str:
    return '\n'.join(json.dumps(row) for row in rows) + '\n\n'


def hot(each: list[str]) -> list[int]:
    return [int(name in each) for name in NAMES]


@pytest.mark.parametrize('name, make, options', [
    ('a.csv', lambda path: write_csv(path, ['file_name', 'labels'], [
        [f'{i}.png', ' | '.join(reversed(each)) + '|'] for i, each in enumerate(LABELS)]), {}),
    ('a.csv', lambda path: write_csv(path, ['photo', *NAMES], [
        [f'{i}.png', *hot(each)] for i, each in enumerate(LABELS)]), {}),
    ('a.csv', lambda path: write_csv(path, ['id', 'photo', *NAMES], [
        [i, f'{i}.png', *(str(bool(value)) for value in hot(each))] for i, each in enumerate(LABELS)]),
     {'image_key': 'photo', 'target_key': ','.join(NAMES)}),
    ('a.csv', lambda path: write_csv(path, ['file_name', 'classes'], [
        [f'{i}.png', '|'.join(map(str, each))] for i, each in enumerate(numbers(LABELS))]), {}),
    ('a.jsonl', lambda path: path.write_text(lines_of([
        {'file_name': f'{i}.png', 'labels': each} for i, each in enumerate(LABELS)])), {}),
    ('a.jsonl', lambda path: path.write_text('\ufeff' + lines_of([
        {'file': {'path': f'{i}.png'}, 'objects': [{'category': label} for label in each * 2]}
        for i, each in enumerate(numbers(LABELS))])), {'image_key': 'file/path', 'target_key': 'objects/category'}),
    ('a.jsonl', lambda path: path.write_text(lines_of([
        {'file_name': f'{i}.png', 'y': hot(each)} for i, each in enumerate(LABELS)])),
     {'target_key': 'y', 'multihot': 3}),
    ('a.jsonl', lambda path: path.write_text(lines_of([
        {'file_name': f'{i}.png', **dict(zip(NAMES, hot(each), strict=True))} for i, each in enumerate(LABELS)])),
     {'target_key': ','.join(NAMES)}),
], ids=['names', 'columns', 'chosen-columns', 'numbers', 'json', 'nested', 'multihot', 'fields'])
def test_all_forms_of_label_files_say_the_same(pictures: Path, name: str, make: Any, options: dict[str, Any]) -> None:
    make(pictures / name)
    reader = LabelFileReader(str(pictures / name), str(pictures), 3, **options)
    assert [labels for _, labels in reader.samples] == numbers(LABELS)
    assert reader.filenames() == [f'{index}.png' for index in range(6)]
    assert reader.class_to_idx in ({}, {name: index for index, name in enumerate(NAMES)})
    with reader[3][0] as file:
        assert Image.open(file).size == (16, 16)


def test_a_class_map_orders_the_labels_and_may_know_more(pictures: Path) -> None:
    labels_csv(pictures, LABELS)
    (pictures / 'map.txt').write_text('red\ngrey\nblue\ngreen\n')
    reader = LabelFileReader(str(pictures / 'labels.csv'), str(pictures), 4, str(pictures / 'map.txt'))
    assert [labels for _, labels in reader.samples] == [[0], [], [0, 2], [0, 2, 3], [3], [2]]


@pytest.mark.parametrize('name, text, options, words', [
    ('a.txt', 'x', {}, 'suffix must be .csv or .jsonl'),
    ('a.csv', '', {}, 'must name two or more different columns, got nothing'),
    ('a.csv', 'file_name,labels,labels\n', {}, 'must name two or more different columns'),
    ('a.csv', 'file_name,labels\n', {}, 'lists no image'),
    ('a.csv', 'file_name,labels\n0.png,red,blue\n', {}, 'line 2: 3 cells for 2 columns'),
    ('a.csv', 'file_name,labels\n0.png,red\n\n,blue\n', {}, "line 4: '' is not a file name"),
    ('a.csv', 'file_name,labels\n0.png,"red\n', {}, 'cannot be read'),
    ('a.csv', 'file_name,labels\n0.png,red\n1.png,blue\n./0.png,green\n', {},
     "line 4: './0.png' is already listed in line 2"),
    ('a.csv', 'file_name,labels\n0.png,red|gray\n', {'class_map': {'red': 0, 'grays': 1}}, "did you mean 'grays'"),
    ('a.csv', 'file_name,labels\n0.png,red|gray\n', {'class_map': {'red': 0, 'x': 1}}, "are 'red' and 1 more"),
    ('a.csv', 'file_name,labels\n0.png,red\n', {}, 'but the model has 3 classes: set --num-classes 1'),
    ('a.csv', 'file_name,labels\n0.png,1|3\n', {}, '3 is not a class index below 3'),
    ('a.csv', 'file_name,red,blue\n0.png,1,2\n', {}, "'2' in 'blue' is neither 0 nor 1"),
    ('a.csv', 'file_name,labels\n0.png,red\n', {'target_key': 'colors'}, "no column 'colors'.*file_name, labels"),
    ('a.csv', 'file_name,labels\n0.png,red\n', {'multihot': 3}, 'multihot works with JSON lines'),
    ('a.jsonl', '{"file_name": "0.png", "labels": ["red"]\n', {}, 'line 1: not valid JSON'),
    ('a.jsonl', '\n[1]\n', {}, 'line 2: expected an object, got list'),
    ('a.jsonl', '{"file_name": "0.png", "label": 1}\n', {}, "no field 'labels'"),
    ('a.jsonl', '{"file_name": "0.png", "labels": "red"}\n', {}, "must be a list of names or class indices, got 'red'"),
    ('a.jsonl', '{"file_name": "0.png", "labels": [true]}\n', {}, 'must be a list of names or class indices'),
    ('a.jsonl', '{"file_name": "0.png", "labels": [-1]}\n', {}, '-1 is not a class index below 3'),
    ('a.jsonl', '{"file_name": "0.png", "labels": ["red", 1]}\n', {}, 'mixes names'),
    ('a.jsonl', '{"file_name": "0.png", "labels": [1, 0]}\n', {'multihot': 3}, 'list of 3 numbers'),
    ('a.jsonl', '{"file_name": "0.png", "labels": [1, 0, 0.5]}\n', {'multihot': 3}, r'labels\[2\].* neither 0 nor 1'),
    ('a.jsonl', '[' * 100_000, {}, 'line 1: not valid JSON'),
])
def test_faults_of_label_files_name_the_line(pictures: Path, name: str, text: str, options: dict[str, Any], words: str,
                                             ) -> None:
    (pictures / name).write_text(text)
    with pytest.raises(DatasetError, match=words):
        LabelFileReader(str(pictures / name), str(pictures), 3, **options)


def test_images_that_do_not_exist_are_named(pictures: Path) -> None:
    labels_csv(pictures, [*LABELS, ['red'], ['blue']])
    with pytest.raises(DatasetError, match='2 of 8 images .* do not exist in .*: 6.png, 7.png; restore'):
        LabelFileReader(str(pictures / 'labels.csv'), str(pictures), 3)


def test_a_binary_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'a.csv').write_bytes(b'\x80\x04\x95file_name')
    with pytest.raises(DatasetError, match='cannot be read'):
        read_label_file(str(tmp_path / 'a.csv'))


def built(train_args: Args, root: Any, *flags: str, split: str = 'train') -> tuple[Classes, Any]:
    args = train_args('--data-dir', str(root), '--task', 'multi_label', '--num-classes', '3', *flags)
    classes = Classes(args.num_classes)
    return classes, dataset.build_dataset(args, classes, split, True, 'RGB', None)


def test_where_label_files_are_looked_for(train_args: Args, label_root: str, pictures: Path, tmp_path: Path) -> None:
    _, found = built(train_args, label_root)
    assert len(found) == 24
    labels_csv(pictures, LABELS)
    (pictures / 'labels.csv').rename(pictures / 'few-train.csv')
    _, found = built(train_args, pictures, '--label-file', 'few-{split}.csv')  # no folder of the split
    assert len(found) == 6 and found.filename(4) == '4.png'
    _, found = built(train_args, pictures, '--label-file', str(pictures / 'few-train.csv'))
    assert len(found) == 6
    with pytest.raises(DatasetNotFoundError, match='no labels in .*--label-file'):
        built(train_args, pictures)
    with pytest.raises(DatasetNotFoundError, match="'few-test.csv' is neither in"):
        built(train_args, pictures, '--label-file', 'few-{split}.csv', split='test')
    for name in ('labels.csv', 'metadata.jsonl'):
        (pictures / name).write_text('')
    with pytest.raises(DatasetError, match='labels.csv and metadata.jsonl: choose one'):
        built(train_args, pictures)
    (tmp_path / 'images.tar').write_bytes(b'')
    with pytest.raises(DatasetError, match='is a file: unpack it'):
        built(train_args, tmp_path / 'images.tar')


def test_targets_are_multi_hot(train_args: Args, label_root: str) -> None:
    classes, found = built(train_args, label_root)
    assert classes.names == list(NAMES)
    targets = torch.stack([found[index][1] for index in range(6)])
    assert targets.dtype == torch.float32 and targets.tolist() == [hot(each) for each in LABELS]
    assert found.target_transform(UNREADABLE).tolist() == [UNREADABLE] * 3
    assert MultiHot(3, dense=True)([0.5, 0, 1]).tolist() == [0.5, 0, 1]


class Stored(Reader):
    """Reader of a stored set, such as those of Hugging Face."""

    def __getitem__(self, index: int) -> tuple[Any, list[float]]:
        file = io.BytesIO()
        Image.new('RGB', (16, 16)).save(file, 'PNG')
        return file, [0., 0.5, 1.]

    def __len__(self) -> int:
        return 2

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return str(index)


def test_the_format_of_targets_reaches_its_reader(train_args: Args, pictures: Path, monkeypatch: pytest.MonkeyPatch,
                                                  ) -> None:
    calls: list[Any] = []

    def create(name: str, **kwargs: Any) -> Any:
        calls.append((name, kwargs['target_format']))
        return ImageDataset('', reader=Stored())

    monkeypatch.setattr(dataset, 'create_dataset', create)
    _, found = built(train_args, '', '--dataset', 'hfds/some/photos', '--target-format', 'multihot')
    assert calls == [('hfds/some/photos', 'multihot')] and found[0][1].tolist() == [0., 0.5, 1.]
    _, found = built(train_args, '', '--dataset', 'hfds/some/photos')
    with pytest.raises(DatasetError, match='check --num-classes'):
        found[0]  # not class numbers
    (pictures / 'labels.jsonl').write_text(lines_of([{'file_name': '0.png', 'labels': [0, 1, 1]}]))
    assert built(train_args, pictures, '--target-format', 'multihot')[1].reader.samples[0][1] == [1, 2]
    with pytest.raises(DatasetError, match='list of 2 numbers'):
        built(train_args, pictures, '--target-format', 'multihot', '--num-classes', '2')


@pytest.mark.parametrize('dense, labels', [
    (False, [3]), (False, [-1]), (False, ['red']), (False, None), (True, [0, 1]), (True, [0, 1, 2]), (True, 'x')])
def test_labels_that_are_no_classes_are_errors(dense: bool, labels: Any) -> None:
    with pytest.raises(DatasetError, match='check --num-classes, --target-key and --target-format'):
        MultiHot(3, dense)(labels)


def test_splits_must_agree_on_the_classes(train_args: Args, label_root: str, pictures: Path) -> None:
    classes, _ = built(train_args, label_root)
    write_csv(pictures / 'labels.csv', ['file_name', 'red', 'green', 'blue'], [['0.png', 1, 0, 0]])
    other = DataSettings(data_dir=str(pictures), task='multi_label', class_map={'red': 0, 'green': 1, 'blue': 2})
    with pytest.raises(DatasetError, match="unknown label|class 0 is 'red', but it is 'blue'"):
        dataset.build_dataset(other, classes, '', False, 'RGB', None)


@pytest.mark.parametrize('options, words', [
    (['--task', 'classification', '--label-file', 'x.csv'], '--label-file has no effect without --task multi_label'),
    (['--task', 'classification', '--threshold', '0.4'], '--threshold has no effect'),
    (['--task', 'classification', '--target-format', 'multihot'], '--target-format has no effect'),
    (['--threshold', '1'], 'must be > 0 and < 1, got 1'),
    (['--threshold', 'nan'], 'must be > 0 and < 1, got nan'),
    (['--kd-model-name', 'test_vit'], '--kd-model-name does not work with --task multi_label'),
    (['--jsd-loss'], '--jsd-loss does not work'),
    (['--loss-type', 'ce'], '--loss-type ce is for one class per image'),
    (['--task', 'classification', '--loss-type', 'zlpr'], 'for several labels per image'),
    (['--loss-type', 'zlpr'], 'add --smoothing 0'),
    (['--loss-type', 'twoway', '--smoothing', '0', '--mixup', '0.1'], 'leave mixup and CutMix out'),
    (['--class-weights', 'neg_pos', '--bce-pos-weight', '2'], 'cannot be combined'),
    (['--class-weights', 'balanced', '--loss-type', 'zlpr', '--smoothing', '0'], 'works with bce and asl'),
    (['--dataset', 'cpool/shapes'], 'one class per image'),
    (['--dataset', 'hfds/x', '--label-file', 'x.csv'], '--label-file works with folders only'),
    (['--eval-metric', 'top5'], "'top5' is unknown: choose loss, map"),
    (['--task', 'classification', '--eval-metric', 'map'], "'map' is unknown: choose loss, top1, top5"),
])
def test_flags_that_do_not_go_together(run: Callable[..., Any], options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(*options)


LOGITS = torch.tensor([[2., 0.5, -1.], [0.3, 0.1, 0.2], [-2., 1., 0.]])
TARGET = torch.tensor([[1., 0., 1.], [0., 0., 0.], [1., 1., 0.]])


def built_loss(train_args: Args, root: str, *flags: str) -> torch.nn.Module:
    return loss.build_loss(train_args(
        '--data-dir', root, '--task', 'multi_label', '--num-classes', '3', *flags), Classes(3))


@pytest.mark.parametrize('flags, kind', [
    ([], BinaryCrossEntropy), (['--loss-type', 'asl', '--smoothing', '0'], AsymmetricLossMultiLabel),
    (['--loss-type', 'twoway', '--smoothing', '0'], TwoWayLoss),
    (['--loss-type', 'zlpr', '--smoothing', '0'], ZlprLoss),
    (['--loss-type', 'db', '--smoothing', '0'], DistributionBalancedLoss),
])
def test_kinds_of_losses(train_args: Args, label_root: str, flags: list[str], kind: type) -> None:
    loss_fn = built_loss(train_args, label_root, *flags)
    assert type(loss_fn) is kind and loss_fn(LOGITS, TARGET).isfinite()


def test_values_of_losses(train_args: Args, label_root: str) -> None:
    def by_hand(target: torch.Tensor, positive: Any = 1.) -> torch.Tensor:
        return -(positive * target * F.logsigmoid(LOGITS) + (1 - target) * F.logsigmoid(-LOGITS)).mean()

    plain = built_loss(train_args, label_root, '--smoothing', '0')(LOGITS, TARGET)
    torch.testing.assert_close(plain, by_hand(TARGET))
    # of 6 images 3 are blue, 2 green, 3 red, and all of them four times
    ratio = built_loss(train_args, label_root, '--smoothing', '0', '--class-weights', 'neg_pos')(LOGITS, TARGET)
    torch.testing.assert_close(ratio, by_hand(TARGET, torch.tensor([1., 2., 1.])))
    assert not torch.equal(ratio, plain)
    zlpr = built_loss(train_args, label_root, '--smoothing', '0', '--loss-type', 'zlpr')(LOGITS, TARGET)
    rows = [math.log(1 + sum(math.exp(-x) for x, y in zip(*pair, strict=True) if y))
            + math.log(1 + sum(math.exp(x) for x, y in zip(*pair, strict=True) if not y))
            for pair in zip(LOGITS.tolist(), TARGET.tolist(), strict=True)]
    torch.testing.assert_close(zlpr, torch.tensor(sum(rows) / 3))


def test_weights_that_cannot_be_computed(train_args: Args, pictures: Path) -> None:
    labels_csv(pictures, [[*each, 'red'] for each in LABELS])
    settings = train_args('--data-dir', str(pictures), '--train-split', '', '--task', 'multi_label', '--num-classes',
                          '3', '--class-weights', 'neg_pos')
    with pytest.raises(ConfigError, match='every image of split .* has class 2'):
        loss.resolve_positive_weight(settings, Classes(3))
    labels_csv(pictures, [['blue'], ['green', 'gray'], [], [], [], []])
    mapped = dataclasses.replace(settings, class_map={'blue': 0, 'green': 1, 'gray': 2, 'red': 3})
    with pytest.raises(ConfigError, match='class 3 has no image'):
        loss.resolve_positive_weight(mapped, Classes(4))
    with pytest.raises(ConfigError, match='add --task multi_label'):
        loss.resolve_positive_weight(dataclasses.replace(mapped, task='classification'), Classes(4))


def test_a_run_learns_and_validation_tells_the_same(
        run: Callable[..., Any], label_root: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    result = run('--epochs', '8', '--lr', '1e-2', '--experiment', 'x', '--smoothing', '0', '--drop', '0',
                 '--mean', '0.5', '0.5', '0.5', '--std', '0.25', '0.25', '0.25', '--scale', '0.9', '1')
    last = result['epochs'][-1]
    assert last['eval_map'] > 90 and result['epochs'][0]['eval_loss'] > last['eval_loss']
    assert 'eval_top1' not in last and result['best_metric'] == max(each['eval_map'] for each in result['epochs'])
    path = f'{result["folder"]}/last.pth.tar'
    assert load(path)['args']['class_names'] == list(NAMES)

    out = {name: str(tmp_path / name) for name in ('rows.json', 'scores.npz', 'plots')}
    flags = ['--data-dir', label_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-b', '4',
             '-j', '0', '--device', 'cpu', '--mean', '0.5', '0.5', '0.5', '--std', '0.25', '0.25', '0.25']
    row = validate(read_validate([
        *flags, '--task', 'multi_label', '--checkpoint', path, '--predictions', out['scores.npz'],
        '--predictions-topk', '0', '--plots', out['plots']]))
    for name in ('map', 'micro_map', 'micro_f1', 'macro_recall', 'sample_f1', 'exact_match'):
        assert row[name] == round(last[f'eval_{name}'], 4), name
    assert [each['name'] for each in row['per_class']] == list(NAMES)
    assert [each['images'] for each in row['per_class']] == [4, 2, 5] and (row['images'], row['empty']) == (9, 2)
    scores = np.load(out['scores.npz'])
    assert scores['target'].dtype == np.int8 and scores['target'][:6].tolist() == [hot(each) for each in LABELS]
    hits = ((scores['logits'] >= 0) == scores['target']).all(axis=1)
    assert row['exact_match'] == pytest.approx(100 * hits.mean(), abs=1e-4)
    assert sorted(each.name for each in Path(out['plots']).iterdir()) == ['per_class.png', 'precision_recall.png']

    stricter = validate(read_validate([
        *flags, '--task', 'multi_label', '--checkpoint', path, '--threshold', '0.999']))
    assert stricter['micro_recall'] < row['micro_recall'] and stricter['map'] == row['map']


def test_results_in_every_form(run: Callable[..., Any], label_root: str, tmp_path: Path) -> None:
    folder = run('--epochs', '2', '--experiment', 'x')['folder']
    rows = run_validation(read_validate([
        '--data-dir', label_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0',
        '--device', 'cpu', '--task', 'multi_label', '--checkpoint', folder]))
    # two epochs: the last and the best are further names of these files
    assert isinstance(rows, list) and len(rows) == 2 and rows == sorted(rows, key=lambda row: -row['map'])
    for kind in ('csv', 'json', 'md'):
        write_results(str(tmp_path / 'rows'), rows, kind)
        text = (tmp_path / 'rows').read_text()
        assert ('| mAP % | ' if kind == 'md' else 'micro_f1') in text and 'top1' not in text


def test_another_task_than_that_of_the_checkpoint(run: Callable[..., Any], run_train: Callable[..., Any],
                                                  label_root: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_train('--epochs', '1', '--experiment', 'single')['folder']
    with pytest.raises(ConfigError, match='trained with --task classification, this is --task multi_label'):
        run('--epochs', '2', '--experiment', 'single', '--resume', 'auto')
    validate(read_validate([
        '--data-dir', label_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0',
        '--device', 'cpu', '--task', 'multi_label', '--checkpoint', f'{folder}/last.pth.tar']))
    assert 'was trained with --task classification' in caplog.text


def test_a_run_that_breaks_off_ends_as_the_uninterrupted_one(run: Callable[..., Any], load: Callable[..., Any]) -> None:
    flags = ['-b', '4', '--epochs', '3', '--mixup', '0.2', '--cutmix', '1', '--class-weights', 'neg_pos',
             '--model-ema', '--model-ema-decay', '0.7']
    whole = run(*flags, '--experiment', 'whole')
    flags += ['--experiment', 'broken', '--resume', 'auto', '--recovery-interval', '1']
    for stop in (2, 9):
        break_off(lambda: run(*flags), stop)
    again = run(*flags)
    assert unequal(load(whole['folder'], 'last.pth.tar'), load(again['folder'], 'last.pth.tar')) == []
    assert rows(whole['folder']) == rows(again['folder'])
    other = run(*flags[:-4], '--experiment', 'other', '--seed', '1')
    assert unequal(load(whole['folder'], 'last.pth.tar'), load(other['folder'], 'last.pth.tar')) != []


def test_unreadable_images_are_counted(run: Callable[..., Any], label_root: str, tmp_path: Path,
                                       caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / 'damaged'
    paint(root / 'train', LABELS * 4, 0)
    paint(root / 'validation', LABELS, 1)
    for name in ('train/5.png', 'validation/2.png'):
        (root / name).write_bytes(b'no image')
    result = run('--data-dir', str(root), '--epochs', '1', '--max-bad-samples', '1')
    assert 'image 5.png' in caplog.text
    assert math.isfinite(result['epochs'][0]['train_loss']) and math.isfinite(result['epochs'][0]['eval_map'])
