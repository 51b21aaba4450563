"""What a finished run becomes: a row of the results and an entry of the zoo."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.release import release
from benchmarks.results import format_table, measure
from benchmarks.zoo import card
from cpool_vision.engine.settings.config import read_validate
from cpool_vision.engine.validate.run import validate

MODEL = ['--model', 'resnet_micro_cpool_32', '--model-kwargs', 'channels=[8,8,8,8]', 'layers=[1,1,1,1]']
INPUT = ['--mean', '0.4', '0.5', '0.6', '--std', '0.3', '0.3', '0.3', '--crop-pct', '1.0']


def test_a_run_becomes_a_row_and_an_entry_with_the_same_figures(
        run_train: Callable[..., Any], image_root: str, tmp_path: Path) -> None:
    run = Path(run_train(*MODEL, *INPUT, '--val-interval', '2')['folder'])
    row = measure(run, Path(image_root))
    assert row['train_images'] == 24 and row['images'] == 7 and row['epochs'] == 2 and row['arm'] == 'context pool'
    assert '| `resnet_micro_cpool_32` | context pool | 24 | 2 |' in format_table([row])

    entry = tmp_path / 'zoo' / 'tiny'
    release(run, entry, Path(image_root), 'random images', 'python train.py --drop 0.2', 'Good for nothing.')
    again = validate(read_validate([
        '--model', f'local-dir:{entry}', '--data-dir', image_root, '-j', '0', '--device', 'cpu']))
    assert again['loss'] == pytest.approx(row['loss'], abs=1e-3) and again['top1'] == row['top1']
    text = card(entry)
    assert 'trained from scratch on\nrandom images' in text and 'drop: 0.2' in text and 'Good for nothing.' in text
    assert 'mean [0.4, 0.5, 0.6]' in text and 'cat, dog, owl' in text
    assert f'| 24 | 2 | {row["params"] / 1e6:.3f} |' in text and f'| 7 | {row["top1"]:.2f} |' in text
    assert {path.name for path in entry.iterdir()} == {'release.json', 'config.json', 'model.safetensors'}
    with pytest.raises(FileExistsError, match='choose another name'):
        release(run, entry, Path(image_root), '', '', '')


@pytest.mark.parametrize('change, words', [
    ({'mean': 'x'}, 'mean must be 3 numbers'), ({'mean': [None, .5, .5]}, 'mean must be 3 numbers'),
    ({'std': [0, 0, 0]}, 'std must be 3 numbers above 0'), ({'std': [1e999, 1, 1]}, 'std must be 3 numbers'),
    ({'interpolation': 5}, 'interpolation must be one of bilinear'), ({'crop_pct': 'x'}, 'crop_pct must be a number'),
    ({'input_size': [3, 0, 32]}, 'input_size must be three numbers above 0')])
def test_nonsense_in_the_configuration_of_a_folder_is_one_line(change, words, capsys, monkeypatch) -> None:
    from cpool_vision.cli import inspect
    from cpool_vision.engine import model as engine_model

    create = engine_model.create_eval_model

    def changed(*args, **kwargs):
        model = create(*args, **kwargs)
        model.pretrained_cfg = {**model.pretrained_cfg, **change}
        return model

    monkeypatch.setattr(engine_model, 'create_eval_model', changed)
    assert inspect.main(['test_resnet', '--depth', 'never.png']) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the input of 'test_resnet' is not clear") and words in error
