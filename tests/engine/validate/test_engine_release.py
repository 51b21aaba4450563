"""What a finished run becomes: a row of the results and an entry of the zoo."""
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.release import release
from benchmarks.results import add_twins, arm_name, format_table, measure
from benchmarks.zoo import card, format_twins
from cpool_vision.engine.settings.config import read_validate
from cpool_vision.engine.validate.run import validate

MODEL = [
    '--model', 'resnet_micro_cpool_32', '--model-kwargs', 'channels=[8,8,8,8]', 'layers=[1,1,1,1]', 'cpool_groups=1']
INPUT = ['--mean', '0.4', '0.5', '0.6', '--std', '0.3', '0.3', '0.3', '--crop-pct', '1.0']


def test_a_run_becomes_a_row_and_an_entry_with_the_same_figures(
        run_train: Callable[..., Any], base_flags: list[str], image_root: str, tmp_path: Path) -> None:
    command = shlex.join(['python', 'train.py', *base_flags, *INPUT, *MODEL])
    run = Path(run_train(*MODEL, *INPUT, '--val-interval', '2')['folder'])
    row = measure(run, Path(image_root))
    assert row['train_images'] == 24 and row['images'] == 7 and row['epochs'] == 2 and row['arm'] == 'context pool'
    assert '| `resnet_micro_cpool_32` | context pool | 24 | 2 |' in format_table([row])

    entry = tmp_path / 'zoo' / 'tiny'
    release(run, entry, Path(image_root), 'random images', command, 'Good for nothing.')
    again = validate(read_validate([
        '--model', f'local-dir:{entry}', '--data-dir', image_root, '-j', '0', '--device', 'cpu']))
    assert again['loss'] == pytest.approx(row['loss'], abs=1e-3) and again['top1'] == row['top1']
    text = card(entry)
    assert 'trained it from scratch on random images:' in text and 'drop: 0.2' in text and 'Good for nothing.' in text
    assert 'mean [0.4, 0.5, 0.6]' in text and 'cat, dog, owl' in text
    assert f'| 24 | 2 | {row["params"] / 1e6:.3f} |' in text and f'| 7 | {row["top1"]:.2f} |' in text
    assert {path.name for path in entry.iterdir()} == {'release.json', 'config.json', 'model.safetensors'}
    with pytest.raises(FileExistsError, match='choose another name'):
        release(run, entry, Path(image_root), '', '', '')

    # one epoch only: not the command that trained it
    with pytest.raises(ValueError, match='does not give the settings of the run .epochs differ'):
        release(run, tmp_path / 'other', Path(image_root), '', f'{command} --epochs 1', '')
    assert not (tmp_path / 'other').exists()


def test_an_entry_is_set_beside_its_twins(
        run_train: Callable[..., Any], base_flags: list[str], image_root: str, tmp_path: Path) -> None:
    flags = [*INPUT, '--epochs', '1', *MODEL]
    runs = [Path(run_train(*flags, *keywords, '--experiment', str(index))['folder'])
            for index, keywords in enumerate(([], ['cpool_positions=[]'], ['cpool_mixer=depthwise7']))]
    command = shlex.join(['python', 'train.py', *base_flags, *INPUT, '--epochs', '1', *MODEL[:2]])
    file = tmp_path / 'release.json'
    file.write_text(json.dumps({'model': MODEL[1], 'top1': 12.5}))
    rows = add_twins(tmp_path, runs, Path(image_root), 'random images', command)

    facts = json.loads(file.read_text())
    assert facts['top1'] == 12.5 and [row['arm'] for row in rows] == [
        'context pool', 'plain base', 'depthwise 7x7 convolution']
    pool, plain, convolution = facts['twins']['rows']
    assert pool['params'] != plain['params'] != convolution['params'] and plain['top1'] == rows[1]['top1']
    text = format_twins(facts)
    assert f'| {pool["top1"]:.2f} | {pool["top1"] - plain["top1"]:+.2f} |' in text
    assert f'| {plain["top1"]:.2f} |  |' in text and 'cpool_mixer=depthwise7' in text and '24 images, 1 epochs' in text

    assert arm_name({'cpool_depthwise': 7}) == 'context pool beside a depthwise 7x7 convolution'

    before = file.read_text()
    for wrong, words in (
            ((runs[::2], command), 'plain base among them'), ((runs[1:] + runs[1:], command), 'different arms'),
            ((runs, f'{command} --lr 1'), 'lr differ'), ((runs, 'timm train'), 'python train.py')):
        with pytest.raises(ValueError, match=words):
            add_twins(tmp_path, wrong[0], Path(image_root), '', wrong[1])
    file.write_text(before.replace(MODEL[1], 'resnet18_cpool'))
    with pytest.raises(ValueError, match='name runs of that model'):
        add_twins(tmp_path, runs, Path(image_root), '', command)


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
    assert error.startswith("error: invalid input of 'test_resnet'") and words in error
