"""The commands as a user types them: one-line errors, exit codes, parsable results."""
import json
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cpool_vision.cli import train as cli_train
from cpool_vision.cli import validate as cli_validate

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..'))


def run_script(name: str, *flags: str) -> int:
    """Runs a script of the repository as `python NAME FLAGS` does, but in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, 'argv', [name, *flags])
        runpy.run_path(os.path.join(ROOT, name), run_name='__main__')
    return int(caught.value.code or 0)


@pytest.mark.parametrize('flags, words', [
    (['--model', 'vit_smal_cpool_patch16_224'], ['vit_smal_cpool_patch16_224', 'vit_small_cpool_patch16_224']),
    (['--model', 'hopeless'], ['hopeless', 'cpool']),
    (['--dataset', 'cpool/shape'], ['cpool/shape', 'cpool/shapes']),
    (['--data-dir', '/none/such'], ['/none/such', '--data-dir']),
    (['--config', '/none/recipe.yaml'], ['/none/recipe.yaml']),
    (['--resume', '/none/last.pth.tar'], ['/none/last.pth.tar']),
    (['--initial-checkpoint', '/none/w.pth'], ['--initial-checkpoint', '/none/w.pth']),
    (['--output', '/dev/null/runs'], ['/dev/null/runs', '--output']),
    (['--naflex-loader'], ['--naflex-loader', 'whole images']),
], ids=lambda value: value[0] if value[0].startswith('--') else '')
def test_bad_input_is_one_line_and_exit_code_2(base_flags: list[str], capsys: pytest.CaptureFixture[str],
                                               flags: list[str], words: list[str]) -> None:
    assert cli_train.main([*base_flags, *flags]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'Traceback' not in err and '--result' not in out
    for word in words:
        assert word in lines[0]


def test_validation_reports_errors_the_same_way(image_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_validate.main(['--data-dir', image_root, '--model', 'test_vitt', '--device', 'cpu']) == 2
    err = capsys.readouterr().err
    assert 'error: unknown model' in err and 'test_vit' in err and 'Traceback' not in err


def test_unknown_flags_are_argparse_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli_train.main(['--no-such-flag'])
    assert caught.value.code == 2
    assert '--no-such-flag' in capsys.readouterr().err


def test_debug_variable_shows_the_traceback(base_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CPOOL_DEBUG', '1')
    with pytest.raises(ValueError, match='hopeless'):
        cli_train.main([*base_flags, '--model', 'hopeless'])


def test_other_exceptions_are_not_swallowed(base_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cpool_vision.engine.train import fit

    def bug(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fit, 'train_one_epoch', bug)
    with pytest.raises(ZeroDivisionError):
        cli_train.main(base_flags)


def test_interrupt_exits_130(base_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cpool_vision.engine.train import fit

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, 'train_one_epoch', stop)
    assert cli_train.main(base_flags) == 130


def test_train_then_validate_by_script(base_flags: list[str], image_root: str, tmp_path: Any,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('model: test_vit\nimg_size: 32\nepochs: 5\nmodel_kwargs: {img_size: 32}\n')
    flags = [flag for flag in base_flags if flag not in ('--model', 'test_resnet', '--img-size', '32')]
    status = run_script('train.py', '-c', str(recipe), *flags, '--epochs', '1', '--experiment', 'x')
    out, err = capsys.readouterr()
    assert status == 0, err
    result = json.loads(out.split('--result\n')[1])
    assert [row['epoch'] for row in result] == [0]
    assert 'Train: 0 [   1/3]' in err and '\r' not in err  # plain lines without a terminal

    status = run_script(
        'validate.py', '--data-dir', image_root, '--model', 'test_vit', '--num-classes', '3', '--img-size', '32',
        '--model-kwargs', 'img_size=32', '--checkpoint', str(tmp_path / 'runs' / 'x' / 'last.pth.tar'), '-j', '0',
        '--device', 'cpu', '--results-file', str(tmp_path / 'r.json'), '--results-format', 'json')
    out, err = capsys.readouterr()
    assert status == 0, err
    row = json.loads(out.split('--result\n')[1])
    saved = json.loads((tmp_path / 'r.json').read_text())
    assert row == {key: value for key, value in saved.items() if not isinstance(value, (list, dict))}
    assert row['top1'] == pytest.approx(result[-1]['validation']['top1'], abs=1e-3)
    assert row['loss'] == pytest.approx(result[-1]['validation']['loss'], abs=1e-3)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, run_train: Callable[..., Any],
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    run_train('--epochs', '1')
    assert 'Epoch 0:' in capsys.readouterr().err
