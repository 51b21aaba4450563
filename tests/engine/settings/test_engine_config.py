"""YAML settings: precedence, types, and errors that name key and remedy."""
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml

import cpool_vision  # noqa: F401
from cpool_vision.engine.settings import recipes
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.tracking.run_folder import settings_text
from cpool_vision.errors import ConfigError

CONFIGS = recipes.recipe_names()
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
    assert {'quickstart', 'cifar10_vit_micro', 'cifar10_resnet_micro', 'cifar10_convnext_micro',
            'imagenet1k_vit_small', 'imagenet1k_resnet50', 'imagenet1k_convnext_tiny'} <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_recipes_are_found_by_name_and_say_how_to_run_them(name: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = parse('--config', name)
    assert parse('-c', f'{name}.yaml') == args
    assert timm.is_model(args.model)
    text = Path(recipes.recipe_path(name)).read_text(encoding='utf-8')
    assert f'train.py --config {name}' in text.split('\nmodel:')[0]
    if 'imagenet1k' in name:
        assert args.amp and args.channels_last
        assert 'torchrun' in text and 'arXiv' in text
    for key, value in yaml.safe_load(text).items():
        got = getattr(args, key)
        got = list(got) if isinstance(got, tuple) else got
        assert got == pytest.approx(value) if isinstance(value, float) else got == value


def test_a_file_of_the_user_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'imagenet1k_resnet50').mkdir()  # a folder of this name is no file
    assert parse('-c', 'imagenet1k_resnet50').model == 'resnet50_cpool'
    (tmp_path / 'quickstart').write_text('epochs: 77\n')
    assert parse('-c', 'quickstart').epochs == 77


@pytest.mark.parametrize('name, words', [
    ('cifar10_vit_mikro', ['cifar10_vit_mikro', 'did you mean cifar10_vit_micro']),
    ('configs/quickstart.yaml', ['did you mean quickstart']),
    ('xyz', ['xyz', 'quickstart', 'imagenet1k_resnet50']),
])
def test_an_unknown_recipe_names_those_there_are(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse('--config', name)
    assert all(word in str(caught.value) for word in words)


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse('--config', 'list')
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0 and [line.split()[0] for line in lines] == CONFIGS
    assert all(len(line.split()) > 3 for line in lines)
