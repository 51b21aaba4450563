"""validate.py's functions: figures against plain arithmetic, bulk runs, results files, bad input."""
import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform

from cpool_vision.engine.device import Precision, Runtime, resolve_precision
from cpool_vision.engine.settings.config import read_validate
from cpool_vision.engine.settings.validate import ValidateSettings
from cpool_vision.engine.validate import bulk
from cpool_vision.engine.validate.bulk import run_validation, write_results
from cpool_vision.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    DatasetError,
    OutputError,
    UnknownModelError,
)

Validate = Callable[..., Any]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Checkpoint of a test_resnet with 3 classes; its averaged weights differ."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    average = timm.create_model('test_resnet', num_classes=3)
    path = tmp_path / 'weights.pth.tar'
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': average.state_dict()}, path)
    return str(path)


@pytest.fixture
def validate(validate_args: Callable[..., Any], image_root: str, weights: str) -> Validate:
    base = ['--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32',
            '--crop-pct', '1.0', '-j', '0', '-b', '4', '--device', 'cpu', '--checkpoint', weights]
    return lambda *flags: run_validation(validate_args(*base, *flags))


def by_hand(root: str, path: str, use_ema: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the validation images, one image at a time, without the engine."""
    model = timm.create_model('test_resnet', num_classes=3).eval()
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict_ema' if use_ema else 'state_dict'])
    cfg = model.pretrained_cfg
    transform = create_transform((3, 32, 32), crop_pct=1.0, interpolation=cfg['interpolation'], mean=cfg['mean'],
                                 std=cfg['std'])
    outputs, labels = [], []
    for label, name in enumerate(sorted(os.listdir(os.path.join(root, 'validation')))):
        for file in sorted(os.listdir(os.path.join(root, 'validation', name))):
            image = Image.open(os.path.join(root, 'validation', name, file)).convert('RGB')
            with torch.inference_mode():
                outputs.append(model(transform(image)[None])[0])
            labels.append(label)
    return torch.stack(outputs), torch.tensor(labels)


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher'], ['--channels-last', '-b', '7'], ['--torchscript'],
                                   ['--torchcompile', 'eager'], ['-j', '1'], ['--reparam'], ['--retry']],
                         ids=lambda flags: ' '.join(flags) or 'plain')
def test_figures_equal_those_by_hand(validate: Validate, image_root: str, weights: str, flags: list[str]) -> None:
    output, target = by_hand(image_root, weights)
    row = validate(*flags)
    assert row['images'] == 7
    assert row['top1'] == pytest.approx(100 * (output.argmax(1) == target).double().mean().item(), abs=1e-4)
    assert row['top1'] + row['top1_err'] == pytest.approx(100)
    assert row['top5'] == 100  # fewer than five classes
    assert row['loss'] == pytest.approx(F.cross_entropy(output, target).item(), abs=2e-4)
    assert (row['model'], row['img_size'], row['param_count']) == ('test_resnet', 32, 0.37)
    assert row['images_per_sec'] > 0


def test_averaged_weights_on_request_only(validate: Validate, image_root: str, weights: str,
                                          caplog: pytest.LogCaptureFixture) -> None:
    plain, ema = (F.cross_entropy(*by_hand(image_root, weights, use_ema)).item() for use_ema in (False, True))
    assert abs(plain - ema) > 1e-3
    assert validate()['loss'] == pytest.approx(plain, abs=2e-4)
    assert validate('--use-ema')['loss'] == pytest.approx(ema, abs=2e-4)
    torch.save(torch.load(weights, weights_only=True)['state_dict'], weights)
    assert validate('--use-ema')['loss'] == pytest.approx(plain, abs=2e-4)
    assert 'no averaged weights' in caplog.text


@pytest.mark.parametrize('flags', [['--amp', '--amp-dtype', 'bfloat16'], ['--amp'], ['--model-dtype', 'bfloat16']])
def test_low_precision_stays_close(validate: Validate, flags: list[str]) -> None:
    assert validate(*flags)['loss'] == pytest.approx(validate()['loss'], abs=0.05)


@pytest.mark.parametrize('capability, flags, named', [
    ('AVX2', ['--amp', '--amp-dtype', 'bfloat16'], '(AVX2) has no instructions for bfloat16'),
    ('AVX2', ['--model-dtype', 'float16'], 'Drop --model-dtype'),
    ('AVX2', ['--model-dtype', 'float32'], None),
    ('AVX2', [], None),
    ('AVX512', ['--amp', '--amp-dtype', 'bfloat16'], None),
])
def test_emulated_half_precision_warns(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
                                       capability: str, flags: list[str], named: str | None) -> None:
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    resolve_precision(read_validate(['--device', 'cpu', *flags]), torch.device('cpu'))
    assert named in caplog.text if named else not caplog.records


@pytest.mark.parametrize('average', ['micro', 'macro', 'weighted'])
def test_precision_recall_f1(validate: Validate, image_root: str, weights: str, average: str) -> None:
    output, target = by_hand(image_root, weights)
    guess = output.argmax(1)
    hits = [int(((guess == c) & (target == c)).sum()) for c in range(3)]
    guessed = [int((guess == c).sum()) for c in range(3)]
    present = [int((target == c).sum()) for c in range(3)]
    if average == 'micro':
        expected = [sum(hits) / 7] * 3
    else:
        scores = [[h / max(g, 1), h / p, 2 * h / (g + p)] for h, g, p in zip(hits, guessed, present, strict=True)]
        share = [1 / 3] * 3 if average == 'macro' else [p / 7 for p in present]
        expected = [sum(w * s[i] for w, s in zip(share, scores, strict=True)) for i in range(3)]
    row = validate('--metrics-avg', average)
    got = [row[f'{average}_{name}'] for name in ('precision', 'recall', 'f1_score')]
    assert got == pytest.approx([100 * value for value in expected], abs=1e-3)


def test_valid_labels_compete_among_themselves(validate: Validate, image_root: str, weights: str,
                                               tmp_path: Path) -> None:
    root = tmp_path / 'two'
    for name in ('cat', 'owl'):
        shutil.copytree(os.path.join(image_root, 'validation', name), root / name)
    (tmp_path / 'labels.txt').write_text('0\n2\n')
    output, target = by_hand(image_root, weights)
    keep = target != 1
    expected = (output[keep][:, [0, 2]].argmax(1) == target[keep] // 2).double().mean().item()
    row = validate('--data-dir', str(root), '--split', '', '--valid-labels', str(tmp_path / 'labels.txt'),
                   '--metrics-avg', 'macro')
    assert row['top1'] == pytest.approx(100 * expected, abs=1e-4)
    for text, words in (('0\n3\n', "'3'"), ('cat\n', "'cat'"), ('', 'one index per line'), ('1\n1\n', 'twice')):
        (tmp_path / 'labels.txt').write_text(text)
        with pytest.raises(ConfigError, match=words):
            validate('--valid-labels', str(tmp_path / 'labels.txt'))


@pytest.mark.parametrize('damage', ['garbage', 'truncated'])
def test_unreadable_images_are_counted_and_refused(validate: Validate, image_root: str, tmp_path: Path, damage: str,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / 'broken'
    shutil.copytree(image_root, root)
    victim = root / 'validation' / 'dog' / '1.png'
    victim.write_bytes(b'garbage' if damage == 'garbage' else victim.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r'1 of 7 images cannot be read: dog/1.png; restore or remove'):
        validate('--data-dir', str(root))


def test_unreadable_images_may_be_allowed(validate: Validate, image_root: str, tmp_path: Path,
                                          caplog: pytest.LogCaptureFixture) -> None:
    root, less = tmp_path / 'broken', tmp_path / 'less'
    for folder in (root, less):
        shutil.copytree(image_root, folder)
    for name in ('dog/1.png', 'cat/2.png'):
        (root / 'validation' / name).write_bytes(b'garbage')
        os.remove(less / 'validation' / name)
    row = validate('--data-dir', str(root), '--max-bad-samples', '2')
    assert '2 of 7 images cannot be read: cat/2.png, dog/1.png; they are left out' in caplog.text
    assert (row['images'], row['unreadable']) == (5, 2)
    expected = validate('--data-dir', str(less))
    assert [row[key] for key in ('top1', 'brier', 'macro_accuracy')] == pytest.approx(
        [expected[key] for key in ('top1', 'brier', 'macro_accuracy')])
    assert validate('--data-dir', str(root), '--max-bad-samples', '0.2')['images'] == 5
    for limit in ('1', '0.14'):
        with pytest.raises(DatasetError, match='2 of 7 images cannot be read'):
            validate('--data-dir', str(root), '--max-bad-samples', limit)
    with pytest.raises(ConfigError, match='--max-bad-samples must be >= 0, got -1'):
        validate('--max-bad-samples', '-1')


def test_unreadable_validation_images_do_not_enter_the_metrics_of_training(
        run_train: Callable[..., Any], image_root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, less = tmp_path / 'broken', tmp_path / 'less'
    for copy in (root, less):
        shutil.copytree(image_root, copy)
    (root / 'validation' / 'dog' / '1.png').write_bytes(b'garbage')
    os.remove(less / 'validation' / 'dog' / '1.png')
    one, two = (run_train('--data-dir', str(copy), '--epochs', '1', '--experiment', copy.name)['epochs'][0]
                for copy in (root, less))
    assert one['eval_top1'] == two['eval_top1']
    assert one['eval_loss'] == pytest.approx(two['eval_loss'], rel=1e-6)
    assert '1 of 7 images cannot be read: dog/1.png; they are left out' in caplog.text
    with pytest.raises(DatasetError, match='1 of 7 images cannot be read: dog/1.png; restore'):
        run_train('--data-dir', str(root), '--epochs', '2', '--experiment', 'strict', '--max-bad-samples', '0')
    assert os.path.exists(tmp_path / 'runs/strict/last.pth.tar')  # nothing of the epoch is lost


def test_folder_of_checkpoints(validate: Validate, weights: str, tmp_path: Path) -> None:
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    content = torch.load(weights, weights_only=True)
    for number in (2, 10):
        shutil.copy(weights, folder / f'checkpoint-{number}.pth.tar')
    torch.save(content['state_dict_ema'], folder / 'other.pth')
    torch.save({'epoch': 1}, folder / 'useless.pth')
    out = tmp_path / 'results.csv'
    rows = validate('--checkpoint', str(folder), '--results-file', str(out))
    assert [os.path.basename(job) for _, job in bulk.plan(ValidateSettings(checkpoint=str(folder), model='m'))] == [
        'checkpoint-2.pth.tar', 'checkpoint-10.pth.tar', 'other.pth', 'useless.pth']
    assert len(rows) == 3 and rows == sorted(rows, key=lambda row: -row['top1'])
    with open(out, newline='', encoding='utf-8') as file:
        table = list(csv.DictReader(file))
    assert [row['checkpoint'] for row in table] == [row['checkpoint'] for row in rows]
    with pytest.raises(CheckpointNotFoundError, match='contains no'):
        empty = tmp_path / 'none'
        empty.mkdir()
        validate('--checkpoint', str(empty))


def test_wildcards_names_and_files_of_names(tmp_path: Path) -> None:
    assert bulk.plan(ValidateSettings(model='test_vit')) is None
    assert bulk.plan(ValidateSettings(model='local-dir:x')) is None
    names = [name for name, _ in bulk.plan(ValidateSettings(model='test_vit*')) or []]
    assert any(name.startswith('test_vit.') for name in names) and all(name.startswith('test_vit') for name in names)
    everything = [name for name, _ in bulk.plan(ValidateSettings(model='all')) or []]
    assert len(everything) > 500 and not any(name.endswith('_in21k') for name in everything)
    (tmp_path / 'names.txt').write_text('test_vit\n\ntest_resnet\n')
    assert bulk.plan(ValidateSettings(model=str(tmp_path / 'names.txt'))) == [
        ('test_vit', ''), ('test_resnet', '')]
    (tmp_path / 'names.txt').write_text('\n')
    with pytest.raises(ConfigError, match='is an empty file'):
        bulk.plan(ValidateSettings(model=str(tmp_path / 'names.txt')))
    with pytest.raises(ConfigError, match='matches no model'):
        bulk.plan(ValidateSettings(model='zzz*'))


def test_bulk_leaves_failures_out(validate_args: Callable[..., Any], image_root: str, tmp_path: Path) -> None:
    for name in ('a', 'b'):
        model = timm.create_model('test_vit', num_classes=3)
        from timm.models import save_for_hf
        save_for_hf(model, str(tmp_path / name), model_args={}, safe_serialization=True)
    (tmp_path / 'names.txt').write_text(f'local-dir:{tmp_path}/a\nno_such_model\nlocal-dir:{tmp_path}/b\n')
    rows = run_validation(validate_args('--data-dir', image_root, '-m', str(tmp_path / 'names.txt'), '-j', '0',
                                        '-b', '4', '--device', 'cpu'))
    assert {row['model'] for row in rows} == {f'local-dir:{tmp_path}/a', f'local-dir:{tmp_path}/b'}


def test_local_dir_gives_the_saved_logits(validate_args: Callable[..., Any], image_root: str, weights: str,
                                          tmp_path: Path) -> None:
    from timm.models import save_for_hf
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(torch.load(weights, weights_only=True)['state_dict'])
    save_for_hf(model, str(tmp_path / 'zoo'), model_args={}, safe_serialization=True)
    row = run_validation(validate_args('--data-dir', image_root, '--model', f'local-dir:{tmp_path}/zoo', '-j', '0',
                                       '--img-size', '32', '--crop-pct', '1', '--device', 'cpu'))
    assert row['loss'] == pytest.approx(F.cross_entropy(*by_hand(image_root, weights)).item(), abs=2e-4)


def test_retry_halves_the_batch_until_it_fits(validate_args: Callable[..., Any],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fake(settings: ValidateSettings, runtime: Runtime) -> dict[str, Any]:
        tried.append(settings.batch_size)
        if settings.batch_size > 10:
            raise RuntimeError('CUDA out of memory')
        return {'model': settings.model, 'top1': 1.}

    monkeypatch.setattr(bulk, 'validate', fake)
    alone = Runtime(torch.device('cpu'), Precision(None, None, 'cpu'))
    assert bulk.validate_with_retry(validate_args('-b', '32', '--device', 'cpu'), alone)['top1'] == 1.
    assert tried[0] == 32 and tried[-1] <= 10 and tried == sorted(tried, reverse=True)
    monkeypatch.setattr(bulk, 'validate', lambda *_: (_ for _ in ()).throw(RuntimeError('illegal memory access')))
    with pytest.raises(ConfigError, match='illegal memory access'):
        run_validation(validate_args('--retry', '--device', 'cpu'))


@pytest.mark.parametrize('kind', ['csv', 'json'])
def test_results_file_takes_unequal_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f'r.{kind}'
    rows = [{'model': 'a', 'top1': 1.0}, {'model': 'b', 'extra': 2}]
    write_results(str(path), rows, kind)
    if kind == 'json':
        assert json.loads(path.read_text()) == rows
    else:
        assert path.read_text().splitlines() == ['model,top1,extra', 'a,1.0,', 'b,,2']


def test_a_failed_run_leaves_the_former_results(validate: Validate, tmp_path: Path) -> None:
    out = tmp_path / 'results.csv'
    out.write_text('mine')
    with pytest.raises(CheckpointError):
        validate('--results-file', str(out), '--num-classes', '5')
    assert out.read_text() == 'mine'


@pytest.mark.parametrize('flags, error, words', [
    (['--model', 'test_resnett'], UnknownModelError, 'close matches: .*test_resnet'),
    (['--model', 'local-dir:nowhere'], UnknownModelError, 'config.json'),
    (['--checkpoint', 'none.pth'], CheckpointNotFoundError, 'none.pth'),
    (['--model', 'test_vit'], CheckpointError, 'missing'),
    (['--num-classes', '5'], CheckpointError, r'\(3,\) for \(5,\)'),
    (['--split', 'test'], DatasetError, 'train, validation'),
    (['--data-dir', '/none/such'], DatasetError, '/none/such'),
    (['--dataset', 'nope/x'], DatasetError, 'nope/x'),
    (['--dataset', 'cifar10'], DatasetError, 'leave --dataset empty'),
    (['--dataset', 'hfds/'], DatasetError, 'hfds/NAME'),
    (['--results-format', 'xml'], ConfigError, 'xml'),
    (['--results-format', 'json', '--results-file', 'r.md'], ConfigError, 'contradicts'),
    (['--results-file', '/none/such/file.csv'], OutputError, '/none/such/file.csv'),
    (['--real-labels', 'none.json'], ConfigError, 'none.json'),
    (['--num-gpu', '9'], ConfigError, '--num-gpu 9'),
    (['-b', '0'], ConfigError, '--batch-size'),
    (['--valid-labels', 'none.txt'], ConfigError, 'none.txt'),
], ids=lambda value: value if isinstance(value, str) else None)
def test_bad_settings_are_errors(validate: Validate, flags: list[str], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        validate(*flags)


def test_no_data_is_an_error(validate_args: Callable[..., Any], weights: str) -> None:
    with pytest.raises(DatasetError, match='--dataset cpool/shapes'):
        run_validation(validate_args('--model', 'test_resnet', '--num-classes', '3', '--checkpoint', weights,
                                     '--device', 'cpu'))


def test_real_labels_replace_top1(validate: Validate, image_root: str, weights: str, tmp_path: Path) -> None:
    output, target = by_hand(image_root, weights)
    guess = output.argmax(1).tolist()
    names = sorted(str(path.relative_to(Path(image_root) / 'validation'))
                   for path in Path(image_root).glob('validation/*/*.png'))
    # names repeat over the classes of this set: 0.png counts for none, 1.png is right as any class
    real = {'0.png': [], '1.png': [0, 1, 2], '2.png': [(guess[names.index('cat/2.png')] + 1) % 3]}
    (tmp_path / 'real.json').write_text(json.dumps(real))
    row = validate('--real-labels', str(tmp_path / 'real.json'))
    hits = [guess[place] in real[os.path.basename(name)] for place, name in enumerate(names)
            if real[os.path.basename(name)]]
    assert row['real_images'] == len(hits) == 4
    assert row['top1'] == 100 * sum(hits) / len(hits)
    assert row['original_top1'] == pytest.approx(100 * (output.argmax(1) == target).double().mean().item())
    assert row['images'] == 7
    for content, words in (([[0]] * 7, 'no labels for .0.png'), ({'0.png': [3]}, '3 is not a class index below 3'),
                           ({'0.png': [0]}, 'no labels for .1.png'), ({'0.png': 1}, 'list of class indices')):
        (tmp_path / 'real.json').write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=words):
            validate('--real-labels', str(tmp_path / 'real.json'))


def test_mirror_images_in_training_and_validation(
        validate: Validate, run_train: Callable[..., Any]) -> None:
    plain, both = validate(), validate('--tta', '2')
    assert plain['nll'] == validate('--tta', '1')['nll'] != both['nll']
    one, two = (run_train('--epochs', '1', '--tta', tta, '--experiment', tta)['epochs'][0] for tta in ('0', '2'))
    assert one['train_loss'] == two['train_loss'] and one['eval_loss'] != two['eval_loss']
    with pytest.raises(ConfigError, match='--tta 3'):
        validate('--tta', '3')
    with pytest.raises(ConfigError, match='--tta 3'):
        run_train('--tta', '3')


def test_grey_images_for_one_channel(validate_args: Callable[..., Any], image_root: str, tmp_path: Path) -> None:
    path = str(tmp_path / 'gray.pth')
    torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=1).state_dict(), path)
    row = run_validation(validate_args(
        '--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '3', '--input-size', '1', '32', '32',
        '--mean', '0.5', '--std', '0.25', '-j', '0', '--device', 'cpu', '--checkpoint', path))
    assert np.isfinite(row['loss'])


def test_another_normalization_than_in_training_is_reported(
        run_train: Callable[..., Any], validate_args: Callable[..., Any], image_root: str,
        caplog: pytest.LogCaptureFixture) -> None:
    path = str(Path(run_train('--epochs', '1', '--std', '0.3', '0.3', '0.3')['folder']) / 'last.pth.tar')
    flags = ['--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0',
             '--device', 'cpu', '--checkpoint', path]
    run_validation(validate_args(*flags, '--std', '0.3', '0.3', '0.3'))
    assert 'was trained with' not in caplog.text
    run_validation(validate_args(*flags))
    assert 'was trained with --std 0.3 0.3 0.3 and is validated with' in caplog.text
    assert 'trained with --mean' not in caplog.text


def test_local_dir_keeps_its_channels_and_size(validate_args: Callable[..., Any], image_root: str, tmp_path: Path,
                                               ) -> None:
    from timm.models import save_for_hf
    kwargs = {'in_chans': 1, 'img_size': 48, 'depth': 1, 'embed_dim': 32, 'num_heads': 2}
    model = timm.create_model('vit_tiny_patch16_224', num_classes=3, **kwargs)
    save_for_hf(model, str(tmp_path / 'zoo'), model_args=kwargs, safe_serialization=True)
    row = run_validation(validate_args('--data-dir', image_root, '--model', f'local-dir:{tmp_path}/zoo', '-j', '0',
                                       '--mean', '0.5', '--std', '0.5', '--device', 'cpu'))
    assert row['img_size'] == 48
