"""Each flag changes what it is there to change; `flag_cases.json` says what, and where else flags are tested."""
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flag_probes import Probes
from timm.models import create_model

from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.train.fit import train

with open(os.path.join(os.path.dirname(__file__), '..', 'flag_cases.json'), encoding='utf-8') as file:
    CONTENT = json.load(file)
CASES = {name: case for command in ('validate', 'train') for name, case in CONTENT[command].items() if 'probe' in case}


@pytest.fixture
def probes(image_root: str, base_flags: list[str], train_args: Callable[..., Any],
           run_train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Probes:
    return Probes(image_root, base_flags, train_args, run_train, monkeypatch, caplog)


def words(text: str, root: str, folder: Path) -> list[str]:
    """Flags of a case, with the files that it refers to made."""
    (folder / 'map.txt').write_text('owl\ndog\ncat\n')
    if 'WEIGHTS' in text:
        torch.manual_seed(9)
        torch.save(create_model('test_resnet', num_classes=3).state_dict(), folder / 'weights.pth')
    places = {'ROOT': root, 'MAP': str(folder / 'map.txt'), 'WEIGHTS': str(folder / 'weights.pth')}
    return [places.get(word, word) for word in text.split()]


@pytest.mark.parametrize('name', CASES)
def test_flag_has_its_effect(probes: Probes, image_root: str, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    flag = name.replace('_', '-')
    assert f'--{flag}' in case['on'] or f'-{flag[0]} ' in case['on'] or name == 'validation_batch_size'
    probe = getattr(probes, case['probe'])
    off = probe(*words(case['off'], image_root, tmp_path))
    assert probe(*words(case['off'], image_root, tmp_path)) == off
    assert probe(*words(case['on'], image_root, tmp_path)) != off


def test_positional_folder(image_root: str, base_flags: list[str]) -> None:
    flags = [image_root, *base_flags[2:], '--epochs', '1']
    assert len(train(read_train(flags))['epochs']) == 1
