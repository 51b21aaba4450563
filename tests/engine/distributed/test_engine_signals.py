"""SIGTERM, SIGUSR1 and SIGINT: saved between two updates, exit status 143 or 130, at once the second time."""
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from process_tools import start_apart
from resume_tools import rows, unequal

from cpool_vision.cli import train as cli_train
from cpool_vision.engine.distributed import signals
from cpool_vision.engine.distributed.signals import StopRequested, StopSignals
from cpool_vision.engine.train import checkpointer, fit
from cpool_vision.engine.train import loop as train_loop

Train = Callable[..., dict[str, Any]]
Load = Callable[..., dict[str, Any]]
STOPS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """No test leaves handlers of its own."""
    before = [signal.getsignal(number) for number in STOPS]
    yield
    assert [signal.getsignal(number) for number in STOPS] == before


def send_at(monkeypatch: pytest.MonkeyPatch, number: int, epoch: int, batch: int) -> None:
    """Sends this process one signal while it works towards an update."""
    real, places = train_loop._to_device, [(epoch, batch)]

    def to_device(run: Any, *batch_of: Any) -> Any:
        if (run.progress.epoch, run.progress.batch) in places:
            places.clear()
            os.kill(os.getpid(), number)
        return real(run, *batch_of)

    monkeypatch.setattr(train_loop, '_to_device', to_device)


@pytest.mark.parametrize('number, interval', [
    (signal.SIGTERM, '0'), (signal.SIGUSR1, '4'), (signal.SIGINT, '0')])
def test_a_signal_saves_after_the_update_and_the_run_goes_on_exactly(
        run_train: Train, load: Load, number: signal.Signals, interval: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ['-b', '4', '--grad-accum-steps', '2', '--model-ema', '--experiment']
    whole = run_train(*flags, 'whole')['folder']
    flags += ['broken', '--resume', 'auto', '--recovery-interval', interval]
    with monkeypatch.context() as patch:
        send_at(patch, number, 1, 2)
        with pytest.raises(StopRequested, match=r'saved before batch 4 of epoch 1.*--resume auto') as caught:
            run_train(*flags)
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 143)
    again = run_train(*flags)
    assert [row['epoch'] for row in again['epochs']] == [1]
    assert unequal(load(whole, 'last.pth.tar'), load(again['folder'], 'last.pth.tar')) == []
    assert rows(whole) == rows(again['folder'])


@pytest.mark.parametrize('flags, file', [([], 'last'), (['--val-interval', '2'], 'recovery-1-0')])
def test_a_signal_during_validation_is_obeyed_when_it_ends(
        run_train: Train, load: Load, flags: list[str], file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any,
) -> None:
    real = fit.current_lr

    def current_lr(*args: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    flags = ['-b', '4', '--epochs', '2', '--experiment', 'x', '--resume', 'auto', *flags]
    with monkeypatch.context() as patch:
        patch.setattr(fit, 'current_lr', current_lr)
        with pytest.raises(StopRequested, match='before batch 0 of epoch 1'):
            run_train(*flags)
    assert (tmp_path / 'runs' / 'x' / f'{file}.pth.tar').exists()
    assert [row['epoch'] for row in run_train(*flags)['epochs']] == [1]


def test_a_signal_after_the_last_epoch_does_not_make_a_complete_run_fail(
        run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpointer.Checkpointer.after_epoch

    def after_epoch(self: Any, metric: float | None, final: bool) -> None:
        if final:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, metric, final)

    monkeypatch.setattr(checkpointer.Checkpointer, 'after_epoch', after_epoch)
    assert len(run_train('--epochs', '2')['epochs']) == 2


def test_exit_status(base_flags: list[str], monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    send_at(monkeypatch, signal.SIGTERM, 0, 1)
    assert cli_train.main(base_flags) == 143
    err = capsys.readouterr().err
    assert 'stopped by a signal and saved before batch 2 of epoch 0' in err and 'Traceback' not in err
    flags = err.split('continue with the same flags and ')[1].split()
    assert cli_train.main([*base_flags, *flags]) == 0  # into another folder, as the run had no name


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_signal_before_the_first_update_is_obeyed_after_it(
        run_train: Train, load: Load, interruptible: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run owns its folder by then, and gives it back."""
    real = fit.build

    def build(*args: Any) -> Any:
        run = real(*args)
        assert os.path.exists(os.path.join(run.folder, 'run.lock'))
        os.kill(os.getpid(), signal.SIGINT)
        return run

    whole = run_train('-b', '4', '--experiment', 'whole')['folder']
    flags = ['-b', '4', '--experiment', 'broken', '--resume', 'auto']
    with monkeypatch.context() as patch:
        patch.setattr(fit, 'build', build)
        with pytest.raises(StopRequested, match='saved before batch 1 of epoch 0'):
            run_train(*flags)
    assert not os.path.exists(os.path.join(os.path.dirname(whole), 'broken', 'run.lock'))
    assert unequal(load(whole, 'last.pth.tar'), load(run_train(*flags)['folder'], 'last.pth.tar')) == []


def test_a_second_signal_is_obeyed_at_once(interruptible: None) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_repetitions_within_two_seconds_count_once_under_torchrun(
        interruptible: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.]
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    monkeypatch.setattr(signals.time, 'monotonic', lambda: now[0])
    with StopSignals() as stop:
        for now[0] in (100., 100.5, 101.9):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        now[0] = 102.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_other_threads_leave_signals_alone() -> None:
    seen: list[Any] = []

    def run() -> None:
        with StopSignals():
            seen.append([signal.getsignal(number) for number in STOPS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in STOPS]]


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_the_second_signal_has_its_default_action(number: signal.Signals, tmp_path: pathlib.Path) -> None:
    process = start_apart(_signalled_twice, number, output=tmp_path / 'said')
    process.join(300)
    text = (tmp_path / 'said').read_text()
    assert process.exitcode == -number and f'{number.name}: saving after this update' in text
    assert 'saved' in text and 'still here' not in text


def _signalled_twice(number: int) -> None:
    with StopSignals():
        for text in (b'saved', b'still here'):
            os.kill(os.getpid(), number)
            os.write(1, text)
