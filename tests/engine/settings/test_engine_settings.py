"""The typed settings hold every flag with its default, and nothing changes them."""
import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cpool_vision.engine.model import create_eval_model
from cpool_vision.engine.settings import train, validate
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.settings.flags import Settings, build_parser, flag
from cpool_vision.engine.settings.shared import ModelSettings
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.settings.validate import ValidateSettings


@pytest.mark.parametrize('build, kind', [
    (train.build_parser, TrainSettings), (validate.build_parser, ValidateSettings)])
def test_each_setting_is_a_flag_with_the_same_default(build: Callable[[], argparse.ArgumentParser], kind: type) -> None:
    defaults = {action.dest: tuple(action.default) if isinstance(action.default, list) else action.default
                for action in build()._actions if action.dest not in ('help', 'version', 'config')}
    assert {**kind().as_dict(), **defaults} == kind().as_dict()
    assert set(kind().as_dict()) - set(defaults) == kind.without
    assert not TrainSettings.without  # args.yaml must hold flags only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    title = 'example'
    folder: str | None = flag(None, 'where', 'folder', metavar='DIR', nargs='?')
    rates: tuple[float, ...] = flag((0.1, 0.2), 'some')
    loud: bool = flag(False, 'say more', '-l', '--noisy', exclusive='loudness')
    quiet: bool = flag(False, 'say less', exclusive='loudness')
    most: int | None = flag(None, 'at most', '--most')
    other_names: Mapping[str, Any] = flag({}, 'more')


def test_types_and_names_of_flags_follow_from_the_fields() -> None:
    parser = build_parser(Example, 'example', '')
    args = parser.parse_args(['here', '--rates', '1', '2.5', '-l', '--most', '3', '--other-names', 'a=1'])
    assert vars(args) == {'folder': 'here', 'rates': [1., 2.5], 'loud': True, 'quiet': False, 'most': 3,
                          'other_names': {'a': 1}}
    assert parser.parse_args([]).rates == [0.1, 0.2] and parser.parse_args(['--noisy']).loud
    with pytest.raises(SystemExit):
        parser.parse_args(['--loud', '--quiet'])


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelSettings().num_classes = 3  # type: ignore[misc]


def test_what_stands_for_something_else_is_settled_when_the_flags_are_read() -> None:
    settings = read_train(['FOLDER', '--device', 'cpu', '--task', 'multi_label', '--scale', '0.5', '1'])
    assert (settings.data_dir, settings.eval_metric, settings.scale) == ('FOLDER', 'map', (0.5, 1.))
    assert read_train(['FOLDER', '--data-dir', 'OTHER', '--device', 'cpu']).data_dir == 'OTHER'


def test_a_model_without_a_command_line() -> None:
    model = create_eval_model('resnet_micro_cpool_32', num_classes=3)
    assert model.num_classes == 3 and not model.training
