"""Curves of runs, from the tables in their folders."""
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from cpool_vision.cli import plot
from cpool_vision.engine.tracking.run_plots import read_run, runs_figure
from cpool_vision.errors import ConfigError

SUMMARY = ('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
           '0,2.0,1.9,10,50,0.1\n1,1.5,,,,0.05\n2,1.2,1.1,40,80,0.01\n')
UPDATES = ('update,epoch,loss,lr,images_per_sec\n'
           '1,0,2.2,0.1,9\n4,0,1.8,0.1,9\n5,1,1.7,0.05,9\n8,1,nan,0.05,9\n9,2,1.3,0.01,9\n12,2,1.1,0.01,9\n13,3,1.0,0.01,9\n')
SUPPORTS = 'epoch,layer,mean,q05,q50,q95\n0,a,2,1,2,3\n0,b,4,4,4,4\n2,a,3,1,3,6\n2,b,4,4,4,4\n'


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run in its fourth epoch of four updates each."""
    run = tmp_path / 'run'
    run.mkdir()
    for name, text in (('summary', SUMMARY), ('updates', UPDATES), ('supports', SUPPORTS)):
        (run / f'{name}.csv').write_text(text)
    return run


def test_curves_stand_at_their_time(folder: pathlib.Path) -> None:
    run = read_run(str(folder))
    assert run.name == 'run'
    np.testing.assert_allclose(run.epochs['eval_loss'], [[1, 3], [1.9, 1.1]])
    np.testing.assert_allclose(run.epochs['train_loss'][0], [1, 2, 3])
    np.testing.assert_allclose(run.updates['loss'], [[0.25, 1, 1.25, 2.25, 3, 3.25], [2.2, 1.8, 1.7, 1.3, 1.1, 1.0]])
    np.testing.assert_allclose(run.supports['a'][1], [[2, 1, 2, 3], [3, 1, 3, 6]])
    assert list(run.supports) == ['a', 'b'] and run.supports['b'][0].tolist() == [1, 3]


def test_a_run_in_its_first_epoch_has_curves(folder: pathlib.Path) -> None:
    (folder / 'summary.csv').unlink()
    (folder / 'supports.csv').unlink()
    (folder / 'updates.csv').write_text('\n'.join(UPDATES.splitlines()[:3]) + '\n')
    run = read_run(str(folder))
    assert run.epochs == {} and run.updates['loss'][0].tolist() == [0.25, 1.]
    assert len(runs_figure([run]).axes) == 3


def test_pictures_hold_the_curves(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
                                  ) -> None:
    pytest.importorskip('matplotlib')
    run = read_run(str(folder))
    figure = runs_figure([run])
    titles = {axes.get_title(): axes for axes in figure.axes}
    assert {'loss', 'accuracy (%)', 'learning rate', 'a', 'b'} <= set(titles)
    drawn = [line.get_ydata().tolist() for line in titles['loss'].lines]
    assert [1.9, 1.1] in drawn and [2.0, 1.5, 1.2] in drawn
    band = titles['a'].collections[0].get_paths()[0].vertices
    assert {(1., 1.), (1., 3.), (3., 1.), (3., 6.)} <= {(float(x), float(y)) for x, y in band}
    low, high = titles['b'].get_ylim()  # a constant must not be blown up
    assert high - low > 0.3
    path = tmp_path / 'new' / 'curves.png'
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'summary.csv').write_text(SUMMARY)
    assert plot.main([str(folder), str(other), '-o', str(path), '--dpi', '60']) == 0
    assert path.read_bytes().startswith(b'\x89PNG') and str(path) in capsys.readouterr().out
    assert [text.get_text() for text in runs_figure([run, read_run(str(other))]).legends[0].texts] == ['run', 'other']


def test_a_real_run_is_drawn(run_train: Any, tmp_path: pathlib.Path) -> None:
    pytest.importorskip('matplotlib')
    folder = run_train('--model', 'resnet_micro_cpool_32', '--model-kwargs', 'channels=[8,8,8,8]', 'layers=[1,1,1,1]',
                       'cpool_groups=1', '--no-tensorboard')['folder']
    run = read_run(folder)
    assert run.updates['loss'][0][-1] == 2 and run.epochs['eval_top1'][0].tolist() == [1, 2] and len(run.supports) == 2
    assert plot.main([folder, '-o', str(tmp_path / 'a.svg')]) == 0


@pytest.mark.parametrize('name, text, words', [
    ('summary.csv', 'epoch,lr\n0,fast\n', 'summary.csv.*is not a table of a run.*fast'),
    ('summary.csv', 'epoch,lr\nlast,0.1\n', 'summary.csv.*is not a table of a run'),
    ('updates.csv', 'epoch,loss\n0,1\n', 'not those of a run.*update'),
    ('supports.csv', 'epoch,layer,mean\n0,a,1\n', 'not those of a run.*q05'),
    ('summary.csv', b'\xff\xfe\x00\x01', 'summary.csv.*is not a table of a run'),
])
def test_damaged_tables_are_errors(folder: pathlib.Path, name: str, text: str | bytes, words: str) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words):
        read_run(str(folder))


def test_folders_that_are_no_runs_are_errors(folder: pathlib.Path, tmp_path: pathlib.Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = ['-o', str(tmp_path / 'x.png')]
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'begun').mkdir()
    (tmp_path / 'begun' / 'summary.csv').write_text('epoch,lr\n')
    for place, words in (('absent', 'is not a folder'), ('run/summary.csv', 'is not a folder'),
                         ('empty', 'is not the folder of a run'), ('begun', 'has recorded nothing yet')):
        assert plot.main([str(tmp_path / place), *out]) == 2
        message = capsys.readouterr().err
        assert words in message and place in message
    assert plot.main([str(folder), '-o', str(tmp_path / 'x.jpeg2')]) == 2
    assert 'suffix' in capsys.readouterr().err
    assert plot.main([str(folder), '-o', '/dev/null/x.png']) == 2
    assert 'cannot be written' in capsys.readouterr().err
    assert plot.main([str(folder), *out, '--dpi', '0']) == 2
    assert not (tmp_path / 'x.png').exists()


def test_missing_matplotlib_is_an_error(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert plot.main([str(folder), '-o', 'x.png']) == 2
    assert "pip install 'cpool_vision[plot]'" in capsys.readouterr().err
