"""Whole runs of train.py's function on a tiny image folder."""
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from resume_tools import rows
from timm.models import create_model
from timm.models import load_checkpoint as timm_load_checkpoint

from cpool_vision.engine.tracking import run_folder
from cpool_vision.engine.train import fit, objective
from cpool_vision.errors import CheckpointError, ConfigError, DatasetError, OutputError, UnknownModelError

Train = Callable[..., dict[str, Any]]
Load = Callable[..., dict[str, Any]]


def test_a_run_leaves_settings_summary_and_checkpoints(run_train: Train, load: Load) -> None:
    result = run_train('--experiment', 'one', '--model-ema', '--model-ema-decay', '0.5', '--no-tensorboard')
    folder = result['folder']
    assert sorted(os.listdir(folder)) == [
        'args.yaml', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar', 'model_best.pth.tar',
        'previous.pth.tar', 'summary.csv', 'updates.csv']
    with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
        settings = yaml.safe_load(file)
    assert settings['experiment'] == 'one' and settings['lr'] == 1e-3
    table = rows(folder, timed=True)
    assert [row['epoch'] for row in table] == ['0', '1']
    assert list(table[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr',
                              'train_images_per_sec']
    assert float(table[0]['eval_top5']) == 100.  # three classes

    last = load(folder, 'last.pth.tar')
    assert (last['epoch'], last['version'], last['arch']) == (1, 2, 'test_resnet')
    assert last['args']['opt'] == 'adamw' and isinstance(last['args'], dict)
    assert last['metric'] == float(table[1]['eval_top1'])
    assert set(last['state_dict']) == set(last['state_dict_ema'])
    assert not torch.equal(last['state_dict']['fc.weight'], last['state_dict_ema']['fc.weight'])
    best = load(folder, 'model_best.pth.tar')
    assert best['epoch'] == result['best_epoch']
    model = create_model('test_resnet', num_classes=3)
    timm_load_checkpoint(model, os.path.join(folder, 'last.pth.tar'), use_ema=False)
    assert torch.equal(model.fc.weight, last['state_dict']['fc.weight'])


def test_the_weights_alone_are_resumed_on_request(run_train: Train, load: Load) -> None:
    path = os.path.join(run_train('--experiment', 'whole')['folder'], 'checkpoint-0.pth.tar')
    folder = run_train('--experiment', 'rest', '--resume', path, '--no-resume-opt')['folder']
    steps = [each['step'].item() for each in load(folder, 'last.pth.tar')['optimizer']['state'].values()]
    assert set(steps) == {3}  # of AdamW, those of the second epoch


def test_runs_without_a_name_share_no_folder(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noon(run_folder.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls) -> Any:
            return cls(2026, 1, 1, 12)

    monkeypatch.setattr(run_folder, 'datetime', Noon)
    places = [os.path.basename(run_train('--epochs', '1')['folder']) for _ in range(3)]
    assert places == ['20260101-120000-test_resnet-32' + suffix for suffix in ('', '-2', '-3')]


def test_resume_in_place_continues_the_folder(run_train: Train, load: Load) -> None:
    first = run_train('--experiment', 'run', '--epochs', '2', '--checkpoint-hist', '2')
    folder = first['folder']
    before = load(folder, 'last.pth.tar')['saver']
    second = run_train('--experiment', 'run', '--epochs', '4', '--checkpoint-hist', '2', '--resume', 'auto')
    assert second['folder'] == folder
    assert [row['epoch'] for row in rows(folder)] == ['0', '1', '2', '3']
    with open(os.path.join(folder, 'summary.csv'), encoding='utf-8') as file:
        assert file.read().count('epoch,') == 1
    after = load(folder, 'last.pth.tar')['saver']
    assert after['best_metric'] >= before['best_metric']
    assert len([name for name in os.listdir(folder) if name.startswith('checkpoint-')]) == 2
    with open(os.path.join(folder, 'args.1.yaml'), encoding='utf-8') as file:
        assert yaml.safe_load(file)['epochs'] == 2


def test_resume_auto_starts_anew_without_a_checkpoint(run_train: Train) -> None:
    assert len(run_train('--experiment', 'new', '--resume', 'auto', '--epochs', '1')['epochs']) == 1
    with pytest.raises(ConfigError, match='--experiment'):
        run_train('--resume', 'auto')


def test_an_existing_run_is_not_overwritten(run_train: Train) -> None:
    folder = run_train('--experiment', 'run', '--epochs', '1')['folder']
    contents = {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}
    with pytest.raises(OutputError, match='already holds a run.*--resume auto'):
        run_train('--experiment', 'run', '--epochs', '1')
    assert contents == {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}


def test_unwritable_output_is_refused_before_training(run_train: Train, tmp_path: Any,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').write_text('mine')
    monkeypatch.setattr(fit, 'train_one_epoch', lambda *_: pytest.fail('trained'))
    with pytest.raises(OutputError, match='choose another --output') as caught:
        run_train('--output', str(tmp_path / 'file' / 'runs'))
    assert isinstance(caught.value, OSError)
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('flags', [
    ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--model-ema'],
    ['--amp', '--amp-dtype', 'float16', '--model', 'test_vit', '--clip-grad', '1.0', '--clip-mode', 'agc'],
    ['--model-dtype', 'bfloat16', '--model-ema', '--no-prefetcher'],
    ['--jsd-loss', '--aug-splits', '3', '--split-bn', '--aa', 'augmix-m3', '--grad-checkpointing'],
    ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--variable-batch-loss-scale', 'linear'],
    ['--torchscript', '--opt', 'lookahead_sgd', '--sched', 'none'],
    ['--val-split', '', '--no-aug', '--use-multi-epochs-loader'],
    ['--mixup', '0.2', '--mixup-off-epoch', '1', '--epochs', '2', '-j', '1', '--save-images', '--synchronize-step'],
    ['--input-size', '1', '32', '32', '--mean', '0.5', '--std', '0.25', '--fast-norm'],
], ids=lambda flags: flags[0].strip('-'))
def test_flags_train(run_train: Train, load: Load, flags: list[str]) -> None:
    result = run_train('--epochs', '1', *flags)
    content = load(result['folder'], 'last.pth.tar')
    assert all(torch.isfinite(value).all() for value in content['state_dict'].values())
    assert result['epochs'][-1]['train_loss'] > 0


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_trains_and_resumes(run_train: Train, load: Load, kind: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.task import distillation
    real = distillation.create_model
    monkeypatch.setattr(distillation, 'create_model', lambda **kw: real(**{**kw, 'pretrained': False}))
    flags = ['--kd-model-name', 'test_resnet', '--kd-distill-type', kind, '--epochs', '2']
    folder = run_train(*flags, '--experiment', 'kd')['folder']
    again = run_train(*flags, '--experiment', 'rest', '--resume', os.path.join(folder, 'checkpoint-0.pth.tar'))
    assert set(load(again['folder'], 'last.pth.tar')['state_dict']) == set(
        create_model('test_resnet', num_classes=3).state_dict())


@pytest.mark.parametrize('flags, expected', [
    (['--lr', '0.3'], 0.3),
    (['--opt', 'sgd'], 0.1 * 64 * 2 * 4 / 256),
    (['--opt', 'adamw'], 0.1 * (64 * 2 * 4 / 256) ** 0.5),
    (['--opt', 'lamb', '--lr-base', '0.2', '--lr-base-size', '128'], 0.2 * 2),
    (['--opt', 'adamw', '--lr-base-scale', 'linear'], 0.1 * 2),
])
def test_learning_rate_follows_the_batch(train_args: Any, flags: list[str], expected: float) -> None:
    args = train_args('-b', '64', '--grad-accum-steps', '4', *flags)
    assert objective.resolve_lr(args, 2) == pytest.approx(expected)


@pytest.mark.parametrize('flags, error, words', [
    (['--jsd-loss'], ConfigError, '--aug-splits'),
    (['--bce-sum'], ConfigError, '--bce-loss'),
    (['--amp', '--model-dtype', 'bfloat16'], ConfigError, '--amp needs float32'),
    (['--eval-metric', 'f1'], ConfigError, 'f1'),
    (['--split-bn'], ConfigError, '--aug-splits'),
    (['--aug-repeats', '3'], ConfigError, 'torchrun'),
    (['--aug-splits', '1'], ConfigError, '--aug-splits'),
    (['--device', 'gpu0'], ConfigError, 'gpu0'),
    (['--device-modules', 'no_such_module'], ConfigError, 'no_such_module'),
    (['--wandb-resume-id', 'x', '--log-wandb'], ConfigError, '--resume'),
    (['--model-kwargs', 'in_chans=1'], ConfigError, 'in_chans'),
    (['--bn-momentum', '0.2'], UnknownModelError, 'bn_momentum'),
    (['--num-classes', '2'], DatasetError, '--num-classes 3'),
    (['-b', '25'], DatasetError, '--batch-size'),
    (['--train-split', 'training2'], DatasetError, 'train, validation'),
    (['--dataset', 'torch/nothing'], DatasetError, 'torch/nothing'),
    (['--dataset', 'cpool/nothing'], DatasetError, 'cpool/nothing'),
    (['--class-map', 'none.txt'], DatasetError, 'none.txt'),
], ids=lambda value: value if isinstance(value, str) else None)
def test_bad_settings_are_errors(run_train: Train, flags: list[str], error: type, words: str, tmp_path: Any) -> None:
    with pytest.raises(error, match=words.replace('(', r'\(')):
        run_train(*flags)
    assert not (tmp_path / 'runs').exists()


def test_empty_and_missing_folders_are_errors(run_train: Train, tmp_path: Any) -> None:
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    with pytest.raises(DatasetError, match='empty'):
        run_train('--data-dir', str(tmp_path / 'empty'))
    with pytest.raises(FileNotFoundError, match='--data-dir'):
        run_train('--data-dir', str(tmp_path / 'absent'))


@pytest.mark.parametrize('flags, words', [
    (['--num-classes', '4'], r'\(3,\) for \(4,\).*--num-classes'),
    (['--model', 'test_vit'], 'missing.*--model'),
    (['--opt', 'sgd', '--layer-decay', '0.5'], 'optimizer.*--no-resume-opt'),
])
def test_resume_of_another_run_is_refused(run_train: Train, flags: list[str], words: str) -> None:
    folder = run_train('--experiment', 'run', '--epochs', '1')['folder']
    with pytest.raises(CheckpointError, match=words):
        run_train('--resume', os.path.join(folder, 'last.pth.tar'), '--experiment', 'other', *flags)


TINY_VIT = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2']


def test_models_of_a_fixed_size_are_built_for_the_size_asked_for(run_train: Train, load: Load, base_flags: list[str],
                                                                 ) -> None:
    result = run_train(*TINY_VIT, '--epochs', '1', '--img-size', '48')
    assert load(result['folder'], 'last.pth.tar')['state_dict']['pos_embed'].shape[1] == 9 + 1
    index = base_flags.index('--img-size')
    del base_flags[index:index + 2]
    result = run_train(*TINY_VIT, '--epochs', '1', '--input-size', '3', '32', '64', '--experiment', 'wide')
    assert load(result['folder'], 'last.pth.tar')['state_dict']['pos_embed'].shape[1] == 8 + 1


def test_contradicting_sizes_are_errors(run_train: Train) -> None:
    with pytest.raises(UnknownModelError, match='--img-size, --input-size'):
        run_train(*TINY_VIT, '--input-size', '3', '48', '48')
