"""One owner for a run folder."""
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cpool_vision.engine.tracking.run_lock import LOCK, Owner, RunLock
from cpool_vision.errors import OutputError

HOLDER = '''
import sys, time
from cpool_vision.engine.tracking.run_lock import RunLock
RunLock().acquire(sys.argv[1])
print('held', flush=True)
time.sleep(60)
'''


def held_by_another(folder: pathlib.Path) -> subprocess.Popen[str]:
    """A process that holds a folder."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, '-c', HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == 'held\n'
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
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (folder / LOCK).exists()
    with RunLock() as lock:
        lock.acquire(str(folder))
        assert json.loads((folder / LOCK).read_text())['process'] == os.getpid()
    assert 'Taking over' in caplog.text and not (folder / LOCK).exists()


def test_a_process_of_the_same_number_is_not_the_owner(tmp_path: pathlib.Path) -> None:
    RunLock().acquire(str(tmp_path))
    with pytest.raises(OutputError, match='in use'):  # control
        RunLock().acquire(str(tmp_path))
    alter(tmp_path, birth='1')
    RunLock().acquire(str(tmp_path))


@pytest.mark.parametrize('values, words', [
    ({'host': 'elsewhere'}, r'process \d+ on elsewhere .* cannot be seen from here: .* remove .*run.lock'),
    ({'machine': 'another'}, 'cannot be seen from here'),
    ({'process': 'x'}, 'no lock of a run: remove it'),
    ({'more': 1}, 'no lock of a run'),
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
    with pytest.raises(OutputError, match='cannot be seen'):
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
    code = HOLDER.replace("print('held', flush=True)", "print('held', flush=True)\n").replace(
        'RunLock().acquire(sys.argv[1])', 'try:\n    RunLock().acquire(sys.argv[1])\nexcept OSError:\n    sys.exit()')
    dead = held_by_another(tmp_path)
    dead.kill()
    dead.wait()
    processes = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE,  # noqa: S603
                                  text=True) for _ in range(4)]
    lines = []
    try:
        for process in processes:
            assert process.stdout is not None
            lines.append(process.stdout.readline())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(lines) == ['', '', '', 'held\n']


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
        other.wait()
    result = run_train(*flags[len(base_flags):])
    assert len(result['epochs']) == 2 and LOCK not in os.listdir(folder)
