"""YAML settings: precedence, types, and errors that name key and remedy."""
import glob
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml

import cpool_vision  # noqa: F401
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.tracking.run_folder import settings_text
from cpool_vision.errors import ConfigError

CONFIGS = sorted(glob.glob(os.path.join(os.path.dirname(__file__), '..', '..', '..', 'configs', '*.yaml')))
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / 'recipe.yaml'
        path.write_text(text)
        return str(path)
    return write


def parse(*flags: str) -> TrainSettings:
    return read_train(list(flags))


def test_yaml_replaces_defaults_and_the_command_line_wins(write: Write) -> None:
    path = write('lr: 0.5\nepochs: 7\nmodel-ema: true\nopt_betas: [0.9, 0.95]\nmodel_kwargs: {img_size: 64}\n')
    args = parse('--config', path, '--epochs', '3')
    assert (args.lr, args.epochs, args.model_ema, args.opt_betas) == (0.5, 3, True, (0.9, 0.95))
    assert args.model_kwargs == {'img_size': 64}
    assert args.batch_size == 128
    assert parse('-c', path).epochs == 7


def test_numbers_that_yaml_reads_as_text_are_converted(write: Write) -> None:
    args = parse('-c', write('lr: 1e-3\nmin_lr: 1\n'))
    assert (args.lr, args.min_lr) == (1e-3, 1.0)
    assert isinstance(args.min_lr, float)


def test_aliases_are_keys(write: Write) -> None:
    assert parse('-c', write('dr: 0.5\n')).decay_rate == 0.5


def test_saved_settings_can_be_used_as_config(write: Write) -> None:
    args = parse('--model', 'test_vit', '--lr', '0.1', '--device', 'cpu')
    again = parse('--config', write(settings_text(args)))
    assert again == args


@pytest.mark.parametrize('text, words', [
    ('learning_rate: 1\nlr: 2\n', ["'learning_rate'", 'recipe.yaml']),
    ('epoch: 3\n', ["'epoch'", 'did you mean epochs']),
    ('epochs: many\n', ["'epochs'", "'many'", 'int']),
    ('epochs: 2.5\n', ["'epochs'", '2.5']),
    ('amp: yes please\n', ["'amp'", 'true or false']),
    ('input_size: [3, 32]\n', ["'input_size'", '3']),
    ('model_kwargs: [1]\n', ["'model_kwargs'", 'mapping']),
    ('train_size_schedule: fast\n', ["'fast'", 'progressive']),
    ('lr: 1\nlr_base: 1\ndr: 1\ndecay_rate: 2\n', ['decay_rate', 'second time']),
    ('- 1\n- 2\n', ['list']),
    ('lr: [1\n', ['not valid YAML']),
    ('lr: !!python/object/apply:os.getcwd []\n', ['not valid YAML']),
    ('epochs:\n', ["'epochs'", 'empty']),
])
def test_bad_yaml_is_an_error_with_a_remedy(write: Write, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse('--config', write(text))
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_missing_yaml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='none.yaml'):
        parse('--config', str(tmp_path / 'none.yaml'))


def test_device_falls_back_only_when_nobody_asked(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert parse().device == 'cpu'
    assert parse('--device', 'cuda').device == 'cuda'
    assert parse('-c', write('device: cuda\n')).device == 'cuda'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert parse().device == 'cuda'


def test_there_are_configs() -> None:
    names = {os.path.basename(path) for path in CONFIGS}
    assert {'quickstart.yaml', 'cifar10_vit_micro.yaml', 'cifar10_resnet_micro.yaml', 'cifar10_convnext_micro.yaml',
            'imagenet1k_vit_small.yaml', 'imagenet1k_resnet50.yaml', 'imagenet1k_convnext_tiny.yaml'} <= names


@pytest.mark.parametrize('path', CONFIGS, ids=[os.path.basename(path) for path in CONFIGS])
def test_committed_configs_parse_and_say_how_to_run_them(path: str) -> None:
    args = parse('--config', path)
    assert timm.is_model(args.model)
    with open(path, encoding='utf-8') as file:
        text = file.read()
    assert f'train.py --config configs/{os.path.basename(path)}' in text.split('\nmodel:')[0]
    if 'imagenet1k' in path:
        assert args.amp and args.channels_last
        assert 'torchrun' in text and 'arXiv' in text
    for key, value in yaml.safe_load(text).items():
        got = getattr(args, key)
        got = list(got) if isinstance(got, tuple) else got
        assert got == pytest.approx(value) if isinstance(value, float) else got == value
