"""Failures around a run that end in one line: dead workers, a full disk, a dead torchrun, spoilt tables."""
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from process_tools import start_apart
from resume_tools import break_off

from cpool_vision import files
from cpool_vision.cli import inspect as inspect_command
from cpool_vision.cli import plot as plot_command
from cpool_vision.engine.data.worker import explained_deaths
from cpool_vision.engine.distributed.agent import AgentWatch
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.tracking.track_services import TensorBoardTracker
from cpool_vision.engine.train.fit import train
from cpool_vision.errors import DatasetError, OutputError


class Victim(torch.utils.data.Dataset):
    """Its second image kills the worker that reads it."""

    def __init__(self, end: Callable[[], Any]) -> None:
        self.end = end

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 1:
            self.end()
        return index


@pytest.mark.parametrize('end', [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(1)],
                         ids=['killed', 'gone'])
def test_a_killed_worker_names_memory(end: Callable[[], Any]) -> None:
    loader = torch.utils.data.DataLoader(Victim(end), num_workers=1)
    with pytest.raises(DatasetError, match='worker was killed, most likely because memory ran out: lower --workers'):
        with explained_deaths():
            list(loader)


def test_other_errors_of_workers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match='another reason'), explained_deaths():
        raise RuntimeError('another reason')
    with pytest.raises(DatasetError, match='shared memory'), explained_deaths():
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...')


def test_a_full_disk_names_the_folder_and_what_is_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                                          ) -> None:
    content = {'weight': torch.zeros(1000)}
    real = os.fsync

    def refuse(handle: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', refuse)
    for free, words in ((1000, rf"{tmp_path}' is full: [34],\d\d\d bytes more are needed than the 1,000 that are free"),
                        (10 ** 9, 'No space left on device')):
        monkeypatch.setattr(files.shutil, 'disk_usage', lambda path, free=free: type('Usage', (), {'free': free}))
        with pytest.raises(OutputError, match=words):
            files.write_atomic(str(tmp_path / 'a'), lambda file: torch.save(content, file))
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, 'fsync', real)
    files.write_atomic(str(tmp_path / 'a'), lambda file: torch.save(content, file))
    counter = files._Counter()
    torch.save(content, counter)
    assert counter.size == os.path.getsize(tmp_path / 'a')


def test_tensorboard_on_a_full_disk_prints_no_traceback(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                                        ) -> None:
    pytest.importorskip('tensorboard')
    heard: list[Any] = []
    monkeypatch.setattr(threading, 'excepthook', lambda args: heard.append(args.exc_type))
    tracker = TensorBoardTracker.open(str(tmp_path), 0, 0)
    assert tracker is not None

    def refuse(*_: Any) -> None:
        raise OSError(28, 'No space left on device')

    tracker.updates.file_writer.event_writer._async_writer._worker._record_writer.write = refuse
    with pytest.raises(OSError, match='No space left'):
        for update in range(50):
            tracker.log_update(update, 0, {'loss': 1.})
            time.sleep(0.01)
    tracker.updates.file_writer.event_writer._async_writer._worker.join()
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert heard == [ZeroDivisionError]


def _watched(under_torchrun: bool, seconds: float) -> None:
    if under_torchrun:
        os.environ['TORCHELASTIC_RUN_ID'] = 'x'
    signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'asked to stop'))
    with AgentWatch(0.02, 0.1):
        os.getppid = lambda: 1
        time.sleep(seconds)


def test_a_run_without_torchrun_is_asked_to_stop_and_ended(tmp_path: pathlib.Path) -> None:
    done = start_apart(_watched, True, 60, output=tmp_path / 'said')
    alone = start_apart(_watched, False, 0.2, output=tmp_path / 'nothing')
    for process in (done, alone):
        process.join(300)
    assert (done.exitcode, alone.exitcode) == (143, 0)
    said = (tmp_path / 'said').read_text()
    assert 'torchrun is gone' in said and 'asked to stop' in said and not (tmp_path / 'nothing').read_text()


def _wait_for_another_process(argv: list[str]) -> None:
    os.environ.update(TORCHELASTIC_RUN_ID='x', WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT='0')
    parents = iter([2])
    os.getppid = lambda: next(parents, 1)
    train(read_train(argv))


def test_a_process_that_waits_for_others_ends_with_torchrun(base_flags: list[str], tmp_path: pathlib.Path) -> None:
    process = start_apart(_wait_for_another_process, base_flags, output=tmp_path / 'said')
    process.join(300)
    assert process.exitcode == -signal.SIGTERM and 'torchrun is gone' in (tmp_path / 'said').read_text()


SPOILT = {
    'bad byte in args.yaml': ('args.yaml', lambda text: b'\xff\xfe' + text),
    'huge args.yaml': ('args.yaml', lambda text: text + b'#' * (2 << 20)),
    'bad byte in updates.csv': ('updates.csv', lambda text: text.replace(b'0.001', b'\xff.001', 1)),
    'nothing but noise in updates.csv': ('updates.csv', lambda text: np.random.default_rng(0).bytes(500)),
    'a zero in updates.csv': ('updates.csv', lambda text: text + b'\0\n'),
    'bad byte in summary.csv': ('summary.csv', lambda text: text + b'\xff,1\n'),
    'an endless epoch in summary.csv': ('summary.csv', lambda text: text + b'1e999,1\n'),
    'a quotation mark in summary.csv': ('summary.csv', lambda text: text + b'"\n'),
}


@pytest.fixture(scope='module')
def broken_off(flags_into: Callable[[Any], list[str]], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of runs, with one that broke off in its second epoch."""
    output = tmp_path_factory.mktemp('runs')
    break_off(lambda: train(read_train([*flags_into(output), *CONTINUED])), 5)
    return output


CONTINUED = ['--recovery-interval', '1', '--log-interval', '1', '--experiment', 'x', '--resume', 'auto']


@pytest.mark.parametrize('name', SPOILT)
def test_a_spoilt_table_keeps_no_run_from_being_resumed(
        name: str, broken_off: pathlib.Path, run_train: Callable[..., Any], load: Callable[..., Any],
        tmp_path: pathlib.Path) -> None:
    shutil.copytree(broken_off, tmp_path / 'runs')
    folder = tmp_path / 'runs' / 'x'
    file, spoil = SPOILT[name]
    spoilt = spoil((folder / file).read_bytes())
    (folder / file).write_bytes(spoilt)
    assert len(run_train(*CONTINUED)['epochs']) == 1
    stem, ending = os.path.splitext(file)
    assert spoilt in [path.read_bytes() for path in folder.glob(f'{stem}.*{ending}')]
    assert load(folder, 'last.pth.tar')['epoch'] == 1


BOMB = '\n'.join(['a: &a [x, x, x, x, x, x, x, x, x, x]', *(
    f'{two}: &{two} [{", ".join([f"*{one}"] * 10)}]' for one, two in zip('abcdefgh', 'bcdefghi', strict=True))])


@pytest.mark.parametrize('name, content, words', [
    ('args.yaml', BOMB, 'aliases expand to more'), ('args.yaml', 'a: &a [*a]', 'refers to a node that contains it'),
    ('args.yaml', '- 1', 'must contain settings, got list'), ('args.yaml', b'\xff', 'cannot be read'),
    ('args.yaml', '[' * 5000, 'nested too deeply'), ('summary.csv', 'epoch,loss\n1e999,1\n', 'is not a table'),
    ('summary.csv', 'epoch,loss\n0,x\n', 'is not a table'), ('summary.csv', b'\xff' * 100, 'is not a table')])
def test_a_hostile_run_folder_is_one_line(
        name: str, content: Any, words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'summary.csv').write_text('epoch,train_loss\n0,1\n')
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    assert inspect_command.main(['--run', str(tmp_path), '--html', str(tmp_path / 'o.html')]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1 and time.process_time() - started < 20


def test_names_and_figures_of_a_run_are_only_shown(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'a $\\frac{b$ \n_c'
    folder.mkdir()
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_map,eval_macro_f1\n0,1e999,3,4\n1,1,3,5\n')
    (folder / 'supports.csv').write_text('epoch,layer,mean,q05,q50,q95\n0,$\\sqrt{x$,1,1,1,1\n')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'summary.csv').write_text('epoch,train_loss,eval_top1\n0,1,3\n')
    out = str(tmp_path / 'o.png')
    assert plot_command.main([str(folder), '-o', out]) == 0, capsys.readouterr().err
    assert plot_command.main([str(folder), str(tmp_path / 'b'), '-o', out]) == 0


def test_the_panel_of_scores_shows_what_there_is(tmp_path: pathlib.Path) -> None:
    from cpool_vision.engine.tracking.run_plots import read_run, runs_figure
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_map,eval_macro_f1\n0,1,30,40\n1,1,35,45\n')
    panel = next(axes for part in [runs_figure([read_run(str(tmp_path))])] for axes in part.axes
                 if 'labels' in axes.get_title())
    drawn = [line.get_ydata().tolist() for line in panel.lines if len(line.get_ydata())]
    assert drawn == [[30, 35], [40, 45]] and [text.get_text() for text in panel.get_legend().get_texts()] == [
        'mean average precision', 'macro F1']
