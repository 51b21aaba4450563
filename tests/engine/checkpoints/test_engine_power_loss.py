"""The replay of a power loss: what it reads from strace, which states it makes, and that a run survives them."""
import json
import pathlib
import shutil
from collections.abc import Iterator

import pytest

from benchmarks import power_loss
from benchmarks.power_loss import Disk, replay
from benchmarks.recording import Event, Recording
from cpool_vision.engine.checkpoints.seal import save_sealed


def coded(text: str) -> str:
    return '"' + ''.join(f'\\x{byte:02x}' for byte in text.encode()) + '"'


def lines() -> Iterator[str]:
    """A file that is written, flushed and renamed, then the folder is flushed; another one stays open."""
    yield f'openat(AT_FDCWD, {coded("/run/.a.tmp")}, O_RDWR|O_CREAT|O_EXCL, 0600) = 5'
    yield f'write(5, {coded("hallo")}, 5) = 5'
    yield 'lseek(5, 1, SEEK_SET) = 1'
    yield f'write(5, {coded("e")}, 1) = 1'
    yield 'fsync(5) = 0'
    yield 'close(5) = 0'
    yield f'rename({coded("/run/.a.tmp")}, {coded("/run/a")}) = 0'
    yield f'openat(AT_FDCWD, {coded("/run")}, O_RDONLY|O_CLOEXEC) = 5'
    yield 'fsync(5) = 0'
    yield f'openat(AT_FDCWD, {coded("/elsewhere/b")}, O_RDWR|O_CREAT, 0600) = 6'
    yield f'write(6, {coded("x")}, 1) = 1'
    yield f'openat(AT_FDCWD, {coded("/run/missing")}, O_RDONLY) = -1 ENOENT (No such file or directory)'
    yield f'openat(AT_FDCWD, {coded("/run/c")}, O_WRONLY|O_CREAT|O_APPEND, 0600) = 7'
    yield f'write(7, {coded("one")}, 3) = 3'
    yield f'write(7, {coded("two")}, 3) = 3'


def test_states_of_a_folder() -> None:
    events = Recording('/run', lines()).events
    assert [event.kind for event in events] == [
        'names', 'write', 'write', 'sync', 'names', 'sync folder', 'names', 'write', 'write']
    disk = Disk()
    for event in events[:5]:
        disk.take(event)
    states = list(disk.states())
    assert {} in states and {'.a.tmp': b'hello'} in states and {'a': b'hello'} in states
    for event in events[5:]:
        disk.take(event)
    states = list(disk.states())
    assert all(state['a'] == b'hello' for state in states)
    assert sorted(state.get('c', b'none') for state in states) == sorted([
        b'none', b'', b'onetwo', b'one', b'\0' * 6])


def test_calls_that_are_not_understood_are_errors() -> None:
    with pytest.raises(ValueError, match='sendfile of a file of /run is not known'):
        Recording('/run', iter([*lines(), 'sendfile(7, 5, NULL, 10) = 10']))
    with pytest.raises(ValueError, match='came from elsewhere'):
        Recording('/run', iter([*lines(), f'rename({coded("/elsewhere/b")}, {coded("/run/b")}) = 0']))


@pytest.mark.parametrize('left_out', ['', 'sync', 'sync folder'])
def test_what_is_not_flushed_is_lost(tmp_path: pathlib.Path, left_out: str) -> None:
    events: list[Event] = []
    for number in range(2):
        save_sealed(str(tmp_path / 'a'), {'epoch': number}, number + 1)
        events += [
            Event('names', (('.tmp', number),)), Event('write', file=number, data=(tmp_path / 'a').read_bytes()),
            Event('sync', file=number), Event('names', (('.tmp', None), (f'recovery-0-{number}.pth.tar', number))),
            Event('sync folder')]
    events += [Event('names', (('recovery-0-0.pth.tar', None),)), Event('sync folder'), Event('names', (('b', 9),))]
    outcome = replay([event for event in events if event.kind != left_out], tmp_path)
    assert outcome.cuts > 9 and outcome.states >= outcome.distinct > 5
    assert bool(outcome.wrong) == bool(left_out)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('strace') is None, reason='no strace')
def test_a_run_survives_a_loss_of_power_at_any_call(tmp_path: pathlib.Path) -> None:
    assert power_loss.main(['--work', str(tmp_path / 'work'), '--resumes', '6', '-o', str(tmp_path / 'o.json')]) == 0
    content = json.loads((tmp_path / 'o.json').read_text())
    assert content['resumed_equal'] == 6 and content['cuts'] > 300
