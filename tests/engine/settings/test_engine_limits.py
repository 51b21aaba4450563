"""Ranges and choices of the flags: bad input is one line that names flag, value and what is allowed."""
import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpool_vision.cli import inspect, train, validate
from cpool_vision.engine.settings import train as train_settings
from cpool_vision.engine.settings import validate as validate_settings
from cpool_vision.engine.settings.limits import CHOICES, RANGES, Range, check_limits
from cpool_vision.engine.validate import bulk

BAD = {
    '--clip-grad -1': 'must be > 0, got -1', '--weight-decay -1': 'must be >= 0', '--layer-decay 2': '> 0 and <= 1',
    '--reprob 3': '>= 0 and <= 1, got 3', '--hflip 2': '>= 0 and <= 1', '--mixup -1': '>= 0', '--mixup-prob 3': '<= 1',
    '--crop-pct 0': '> 0', '--warmup-epochs -3': '>= 0', '--model-ema-decay 1.5': '<= 1', '--drop-path 1.5': '< 1',
    '--drop 1.2': '< 1', '--smoothing 2': '< 1', '--lr -1': '--lr must be >= 0, got -1', '--min-lr -3': '>= 0',
    '--opt-betas 0.9': 'takes at least two numbers, got 1', '--opt-betas 0.9 1.5': '< 1, got 1.5',
    '--sched cosin': "--sched 'cosin' is unknown: choose cosine, tanh, step", '--opt adamww': 'choose adamw',
    '--gp foo': 'choose avg, max, avgmax', '--interpolation foo': 'choose bilinear, bicubic',
    '--torchcompile foo': "--torchcompile 'foo' is unknown: choose", '--remode noise': 'const, rand, pixel',
    '--train-crop-mode x': 'rrc, rkrc, rkrr', '--mixup-mode all': 'batch, pair, elem', '--fuser x': 'te, old, nvfuser',
    '--scale 1 0.5': 'takes two numbers, the smaller one first, got 1.0 0.5', '--lr nan': '--lr must be >= 0, got nan',
    '--workers -1': '--workers must be >= 0', '--epochs 0': '--epochs must be >= 1', '--img-size 0': '>= 1',
    '--input-size 3 -1 224': '>= 1, got -1', '--std 0 1 1': '--std must be > 0', '--mean inf 0 0': 'finite, got inf',
    '--train-batch-sizes 0': '>= 1', '--threshold 1': '> 0 and < 1', '--worker-seeding some': 'all, part',
    '--kd-loss-type other': 'choose kl', '--amp-dtype float8': 'choose float32', '--clip-mode max': 'norm, value, agc',
    '--lr-base-scale cubic': 'linear, sqrt', '--grad-accum-steps 0': '>= 1', '--seed -1': '>= 0',
    '--max-skipped -1': '--max-skipped must be >= 0, got -1', '--max-bad-samples -1': '>= 0',
}


@pytest.mark.parametrize('flags', BAD)
def test_bad_input_of_train_is_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(['--device', 'cpu', *flags.split()]) == 2
    error = capsys.readouterr().err
    assert flags.split()[0] in error and BAD[flags] in error and error.count('\n') == 1


@pytest.mark.parametrize('flags', ['--batch-size 0', '--crop-pct -1', '--gp foo', '--crop-mode x', '--seed -1',
                                   '--max-bad-samples -1', '--predictions-topk -1', '--results-format xlsx'])
def test_bad_input_of_validate_is_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(['--device', 'cpu', *flags.split()]) == 2
    error = capsys.readouterr().err
    assert flags.split()[0] in error and error.count('\n') == 1


@pytest.mark.parametrize('flags, words', [
    (['--model-kwargs', 'cpool_position=stage'], 'cpool_position'),
    (['--model-kwargs', 'cpool_backend=cuda'], "backend must be one of"),
    (['--device', 'mps'], "--device 'mps'"),
])
def test_models_and_devices_that_cannot_be_had_are_one_line(flags: list[str], words: str,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    if flags[-1] == 'mps' and torch.backends.mps.is_available():
        pytest.skip('it is available')
    assert train.main(['--device', 'cpu', '--model', 'resnet_micro_cpool_32', '--dataset', 'cpool/shapes', '-j', '0',
                       '--train-num-samples', '64', '--val-num-samples', '8', '--num-classes', '10', '-b', '8',
                       '--epochs', '1', '--output', '/nonexistent', *flags]) == 2
    error = capsys.readouterr().err
    assert 'Traceback' not in error and words in error


def test_ends_of_ranges() -> None:
    assert 0 in Range(0) and -1e-9 not in Range(0) and 0 not in Range(0, above=True) and float('nan') not in Range()
    assert 1 in Range(0, 1) and 1 not in Range(0, 1, below=True) and float('inf') not in Range(0)
    assert [str(each) for each in (Range(), Range(1), Range(0, 1, True, True))] == ['finite', '>= 1', '> 0 and < 1']


@pytest.mark.parametrize('module', [train_settings, validate_settings])
def test_help_names_what_is_allowed_and_defaults_are(module: Any) -> None:
    parser: argparse.ArgumentParser = module.build_parser()
    check_limits(parser.parse_args([]))
    text = ' '.join(parser.format_help().split())
    for action in parser._actions:
        if action.dest in RANGES:
            assert f'[{RANGES[action.dest]}]' in (action.help or '')
        if action.dest in CHOICES:
            assert all(each in (action.help or '') for each in CHOICES[action.dest])
        if action.choices is None and action.type in (int, float):
            assert action.dest in {*RANGES, 'local_rank', 'tta', 'num_gpu', 'aug_splits'}
    assert '[>= 1]' in text


def test_every_entry_is_a_flag() -> None:
    dests = {action.dest for module in (train_settings, validate_settings) for action in module.build_parser()._actions}
    assert set(RANGES) | set(CHOICES) <= dests


def test_a_model_without_pools_is_sent_to_retrofitting(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
                                                       ) -> None:
    assert inspect.main(['test_resnet', '--num-images', '1', '-o', str(tmp_path / 'o.png')]) == 2
    assert 'cpool-retrofit' in capsys.readouterr().err


def test_data_come_before_weights(validate_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('cpool_vision.engine.model.create_model', lambda *args, **kwargs: pytest.fail('weights'))
    assert validate.main(['--model', 'resnet50', '--device', 'cpu']) == 2
    assert 'no data: give --data-dir' in capsys.readouterr().err


def test_without_a_connection_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from cpool_vision.engine import model
    tried: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise OSError(-3, 'Temporary failure in name resolution')

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(model.socket, 'create_connection', refuse)
    monkeypatch.setattr(model.urllib.request, 'getproxies', dict)
    model.settle_hub.cache_clear()
    model.settle_hub()
    model.settle_hub()
    assert len(tried) == 1 and constants.HF_HUB_OFFLINE
    model.settle_hub.cache_clear()


def test_names_of_one_file_are_measured_once(tmp_path: pathlib.Path, validate_args: Callable[..., Any]) -> None:
    (tmp_path / 'checkpoint-1.pth.tar').write_bytes(b'a')
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        (tmp_path / name).hardlink_to(tmp_path / 'checkpoint-1.pth.tar')
    (tmp_path / 'other.pth').write_bytes(b'a')
    jobs = bulk.plan(validate_args('--checkpoint', str(tmp_path), '--device', 'cpu'))
    assert jobs is not None and [pathlib.Path(path).name for _, path in jobs] == ['checkpoint-1.pth.tar', 'other.pth']


def test_results_in_a_format_that_is_not_written_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(['--results-file', 'x.xlsx', '--device', 'cpu']) == 2
    assert '.xlsx is not supported; use .csv, .json, .md' in capsys.readouterr().err
