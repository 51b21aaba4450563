"""One owner for a run folder."""
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from process_tools import clean_context

from cpool_vision.engine.tracking.run_lock import LOCK, Owner, RunLock
from cpool_vision.errors import OutputError


def hold(folder: str, answers: Any) -> None:
    lock = RunLock()
    try:
        lock.acquire(folder)
    except OutputError:
        answers.put('')
        return
    answers.put('held')
    time.sleep(60)


def holders(folder: pathlib.Path, count: int = 1) -> tuple[list[Any], list[str]]:
    """Processes that try to hold a folder at once, and what became of each."""
    answers = clean_context().SimpleQueue()
    processes = [clean_context().Process(target=hold, args=(str(folder), answers)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, sorted(answers.get() for _ in processes)


def held_by_another(folder: pathlib.Path) -> Any:
    """A process that holds a folder."""
    (process,), answers = holders(folder)
    assert answers == ['held']
    return process


def alter(folder: pathlib.Path, **values: Any) -> None:
    path = folder / LOCK
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_two_processes_cannot_have_a_folder_and_the_dead_lose_it(
        tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / 'run'
    other = held_by_another(folder)
    try:
        content = json.loads((folder / LOCK).read_text())
        assert content['process'] == other.pid and content['host'] == os.uname().nodename and content['since']
        with pytest.raises(OutputError, match=rf'in use by another run \(process {other.pid} on .* since 20'):
            RunLock().acquire(str(folder))
        assert json.loads((folder / LOCK).read_text()) == content
    finally:
        other.kill()
        other.join()
    assert (folder / LOCK).exists()
    with RunLock() as lock:
        lock.acquire(str(folder))
        assert json.loads((folder / LOCK).read_text())['process'] == os.getpid()
    assert 'Taking over' in caplog.text and not (folder / LOCK).exists()


def test_an_owner_that_nobody_has_waited_for_is_dead(tmp_path: pathlib.Path) -> None:
    """As after the end of its parent in a container whose first process leaves zombies."""
    RunLock().acquire(str(tmp_path))
    with subprocess.Popen(['sleep', '60']) as other:  # noqa: S607
        birth = pathlib.Path(f'/proc/{other.pid}/stat').read_text().split()[21]
        alter(tmp_path, process=other.pid, birth=birth)
        with pytest.raises(OutputError, match='in use'):  # control
            RunLock().acquire(str(tmp_path))
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        os.kill(other.pid, 0)  # still in the table
        with RunLock() as lock:
            lock.acquire(str(tmp_path))


def test_a_process_of_the_same_number_is_not_the_owner(tmp_path: pathlib.Path) -> None:
    RunLock().acquire(str(tmp_path))
    with pytest.raises(OutputError, match='in use'):  # control
        RunLock().acquire(str(tmp_path))
    alter(tmp_path, birth='1')
    RunLock().acquire(str(tmp_path))


@pytest.mark.parametrize('values, words', [
    ({'host': 'elsewhere'}, r'process \d+ on elsewhere .* cannot be checked from here: .* remove .*run.lock'),
    ({'machine': 'another'}, 'cannot be checked from here'),
    ({'process': 'x'}, 'not a lock file of a run: remove it'),
    ({'more': 1}, 'not a lock file of a run'),
])
def test_what_cannot_be_known_is_refused_with_the_way_out(values: dict[str, Any], words: str, tmp_path: pathlib.Path,
                                                          ) -> None:
    RunLock().acquire(str(tmp_path))
    alter(tmp_path, **values)
    with pytest.raises(OutputError, match=words):
        RunLock().acquire(str(tmp_path))
    os.remove(tmp_path / LOCK)
    RunLock().acquire(str(tmp_path))


def test_a_machine_that_was_started_anew_has_lost_its_processes(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Owner.here()
    here = {**real.__dict__, 'machine': 'm', 'boot': 'now'}
    monkeypatch.setattr(Owner, 'here', classmethod(lambda cls: cls(**here)))
    RunLock().acquire(str(tmp_path))
    alter(tmp_path, boot='before')
    RunLock().acquire(str(tmp_path))
    here['machine'] = ''  # the same name alone proves nothing
    os.remove(tmp_path / LOCK)
    RunLock().acquire(str(tmp_path))
    alter(tmp_path, boot='before')
    with pytest.raises(OutputError, match='cannot be checked'):
        RunLock().acquire(str(tmp_path))


def test_another_container_is_seen_by_its_open_file(tmp_path: pathlib.Path) -> None:
    lock = RunLock()
    lock.acquire(str(tmp_path))
    alter(tmp_path, namespace='pid:[1]')
    with pytest.raises(OutputError, match='in use'):
        RunLock().acquire(str(tmp_path))
    lock._file.close()  # as when it died
    RunLock().acquire(str(tmp_path))


def test_release_leaves_what_is_not_ours(tmp_path: pathlib.Path) -> None:
    lock = RunLock()
    lock.acquire(str(tmp_path / 'a'))
    alter(tmp_path / 'a', process=1)
    lock.release()
    assert (tmp_path / 'a' / LOCK).exists()
    with RunLock() as other:
        other.acquire(str(tmp_path / 'b'))
        (tmp_path / 'b' / 'file').write_text('')
    assert os.listdir(tmp_path / 'b') == ['file']
    with RunLock() as other:
        other.acquire(str(tmp_path / 'c'))
    assert not (tmp_path / 'c').exists()


def test_many_at_once_leave_one_owner(tmp_path: pathlib.Path) -> None:
    """All find the lock of a dead process; one may have it."""
    dead = held_by_another(tmp_path)
    dead.kill()
    dead.join()
    processes, answers = holders(tmp_path, 4)
    for process in processes:
        process.kill()
        process.join()
    assert answers == ['', '', '', 'held']


def test_a_second_launch_of_a_run_is_refused_and_harms_nothing(
        base_flags: list[str], run_train: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    flags = [*base_flags, '--experiment', 'x', '--resume', 'auto']
    folder = tmp_path / 'runs' / 'x'
    other = held_by_another(folder)
    try:
        with pytest.raises(OutputError, match='in use by another run'):
            run_train(*flags[len(base_flags):])
        assert os.listdir(folder) == [LOCK]
    finally:
        other.kill()
        other.join()
    result = run_train(*flags[len(base_flags):])
    assert len(result['epochs']) == 2 and LOCK not in os.listdir(folder)
