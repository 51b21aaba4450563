"""The typed settings hold every flag with its default, and nothing changes them."""
import dataclasses

import pytest

from cpool_vision.engine.model import create_eval_model
from cpool_vision.engine.settings import train_flags, validate_flags
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.settings.shared import ModelSettings
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.settings.validate import ValidateSettings


@pytest.mark.parametrize('module, kind', [(train_flags, TrainSettings), (validate_flags, ValidateSettings)])
def test_each_flag_is_a_field_with_the_same_default(module: object, kind: type) -> None:
    defaults = {action.dest: tuple(action.default) if isinstance(action.default, list) else action.default
                for action in module.build_parser()._actions if action.dest not in ('help', 'version', 'config')}
    settings = kind().as_dict()
    assert {name: settings[name] for name in defaults} == defaults
    assert kind is ValidateSettings or set(settings) == set(defaults)  # args.yaml must hold flags only


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
