"""Cuts the power at every point of a run, on paper, and looks whether what the disk holds then can be resumed.

    OMP_NUM_THREADS=1 python -m benchmarks.power_loss --work DIR [-o FILE.json]

A run of train.py is recorded once by strace: every creation, write, rename, link and removal in its folder, and every
fsync. After each of these calls the power may go. What a disk may hold then:
- of the changes to names since the folder was last flushed, any subset, as a file system may write them in any order
  (of more than five, those up to any of them);
- of the bytes of a file since it was last flushed: none, all, the first half, or zeros in their place.

From each state the newest checkpoint is looked for as `--resume auto` does. It must be intact, and no older than the
last one whose save had returned. From a sample of the states the run is resumed to its end and compared with the
recorded one bit for bit. Controls: the same record without the flushes of files, or of folders, must lose checkpoints.
Exit status 0 if all states recover and both controls fail.
"""
import argparse
import contextlib
import datetime
import io
import itertools
import json
import logging
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from cpool_vision.engine.checkpoints.resume import EXTENSION, find_newest
from cpool_vision.engine.checkpoints.seal import read_seal
from cpool_vision.errors import CheckpointError
from cpool_vision.files import write_text
from cpool_vision.profile.measure import machine

from .kill_campaign import ForkedRun
from .kill_test import ROOT, compare_runs
from .recording import CALLS, Event, Recording

FLAGS = [
    '--model', 'vit_micro_cpool_patch4_32', '--model-kwargs', 'depth=1', 'embed_dim=16', 'num_heads=2', '--dataset',
    'cpool/shapes', '--num-classes', '10', '--img-size', '32', '--train-num-samples', '24', '--val-num-samples', '10',
    '-b', '8', '-j', '0', '--epochs', '3', '--opt', 'adamw', '--lr', '1e-2', '--drop', '0.2', '--model-ema',
    '--checkpoint-hist', '1', '--device', 'cpu', '--recovery-interval', '1', '--log-interval', '1', '--no-tensorboard']
DATA = ('lost', 'kept', 'half', 'zeros')
MOST_SUBSETS = 5  # changes of names that are pending at once


@dataclass
class Disk:
    """A folder as programs see it, and what of it is safe.

    Attributes:
        names, safe_names: files by name.
        pending: changes of names since the folder was flushed.
        files, safe_files: bytes by number of the file.
        writes: changes of files since they were flushed.
    """

    names: dict[str, int] = field(default_factory=dict)
    safe_names: dict[str, int] = field(default_factory=dict)
    pending: list[Event] = field(default_factory=list)
    files: dict[int, bytes] = field(default_factory=dict)
    safe_files: dict[int, bytes] = field(default_factory=dict)
    writes: dict[int, list[Event]] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """What an event does."""
        if event.kind == 'names':
            _rename(self.names, event)
            self.pending.append(event)
        elif event.kind == 'sync folder':
            self.safe_names, self.pending = dict(self.names), []
        elif event.kind == 'sync':
            self.safe_files[event.file] = self.files.get(event.file, b'')
            self.writes.pop(event.file, None)
        else:
            self.files[event.file] = _write(self.files.get(event.file, b''), event)
            self.writes.setdefault(event.file, []).append(event)

    def states(self) -> Iterator[dict[str, bytes]]:
        """What may be there when the power comes back."""
        count = len(self.pending)
        subsets = itertools.product((False, True), repeat=count) if count <= MOST_SUBSETS else (
            [place < end for place in range(count)] for end in range(count + 1))
        for chosen in subsets:
            names = dict(self.safe_names)
            for event, done in zip(self.pending, chosen, strict=True):
                if done:
                    _rename(names, event)
            unsafe = any(file in self.writes for file in names.values())
            for data in DATA if unsafe else DATA[:1]:
                yield {name: self._content(file, data) for name, file in names.items()}

    def _content(self, file: int, data: str) -> bytes:
        safe, now, writes = self.safe_files.get(file, b''), self.files.get(file, b''), self.writes.get(file, [])
        if data == 'kept':
            return now
        for event in writes[:len(writes) // 2] if data == 'half' else ():
            safe = _write(safe, event)
        return safe.ljust(len(now), b'\0') if data == 'zeros' else safe


def _rename(names: dict[str, int], event: Event) -> None:
    for name, file in event.names:
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def _write(content: bytes, event: Event) -> bytes:
    if event.data is None:
        return content[:event.offset]
    return content[:event.offset].ljust(event.offset, b'\0') + event.data + content[event.offset + len(event.data):]


def serials_of(events: list[Event], place: pathlib.Path) -> list[int]:
    """For each number of events, the serial number of the newest checkpoint whose save had returned by then.

    A save has returned when, after its rename, anything but the flush of the folder is done.
    """
    disk, saved, renamed, serials = Disk(), 0, 0, [0]
    for event in events:
        if event.kind != 'sync folder':
            saved = max(saved, renamed)
        disk.take(event)
        for name, file in event.names:
            if file is not None and name.endswith(EXTENSION) and not name.startswith('.'):
                place.write_bytes(disk.files[file])
                seal = read_seal(str(place))
                renamed = max(renamed, seal.serial if seal else 0)
        serials.append(saved)
    return serials


@dataclass
class Outcome:
    """What a replay found: how many states, and what is wrong with some; `kept` are states to resume from."""

    cuts: int = 0
    states: int = 0
    distinct: int = 0
    wrong: list[str] = field(default_factory=list)
    kept: list[dict[str, bytes]] = field(default_factory=list)


def replay(events: list[Event], work: pathlib.Path) -> Outcome:
    """Looks for the newest checkpoint in every state that a loss of power may leave."""
    outcome, disk, seen = Outcome(), Disk(), set()
    serials = serials_of(events, work / 'one')
    for cut in range(len(events) + 1):
        if cut:
            disk.take(events[cut - 1])
        outcome.cuts += 1
        for state in disk.states():
            outcome.states += 1
            key = hash((serials[cut], frozenset(state.items())))
            if key in seen:
                continue
            seen.add(key)
            outcome.distinct += 1
            outcome.kept.append(state)
            found = _newest(put(state, work / 'state'))
            if found < serials[cut]:
                outcome.wrong.append(f'after {cut} of {len(events)} calls: checkpoint {found}, not {serials[cut]}')
    return outcome


def put(state: dict[str, bytes], folder: pathlib.Path) -> pathlib.Path:
    """Writes a state into a folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in state.items():
        (folder / name).write_bytes(content)
    return folder


def _newest(folder: pathlib.Path) -> int:
    """Serial number of the checkpoint that a run resumes from; 0 if it starts anew, -1 if it refuses."""
    logging.disable(logging.WARNING)
    try:
        found = find_newest(str(folder))
    except CheckpointError:
        return -1
    finally:
        logging.disable(logging.NOTSET)
    seal = read_seal(found.path) if found.path else None
    return seal.serial if seal else 0


def record(work: pathlib.Path) -> tuple[pathlib.Path, list[Event]]:
    """A run under strace: its folder, and what happened there."""
    trace = work / 'trace'
    subprocess.run(  # noqa: S603
        ['strace', '-xx', '-s', '999999999', '-e', f'trace={CALLS}', '-o', str(trace), sys.executable,  # noqa: S607
         str(ROOT / 'train.py'), *FLAGS, '--output', str(work), '--experiment', 'whole'],
        check=True, cwd=ROOT, capture_output=True)
    with open(trace, encoding='ascii') as lines:
        return work / 'whole', Recording(str(work / 'whole'), lines).events


def resume(state: dict[str, bytes], whole: pathlib.Path) -> list[str]:
    """Resumes a run from a state to its end; what differs from the recorded run."""
    put(state, whole.parent / 'resumed')
    run = ForkedRun(whole.parent, 'resumed', FLAGS)
    with contextlib.redirect_stdout(io.StringIO()):
        run.finish()
        return compare_runs(whole, run.folder)


def main(argv: list[str] | None = None) -> int:
    """Records, replays and prints the outcome; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=pathlib.Path, required=True, help='empty folder')
    parser.add_argument('--resumes', type=int, default=40, help='states that a run is resumed from (default: 40)')
    parser.add_argument('-o', '--output', type=pathlib.Path, help='JSON to write')
    args = parser.parse_args(argv)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        parser.error(f'{work} is not empty: choose another --work')
    if shutil.which('strace') is None:
        parser.error('strace is missing: install it')
    whole, events = record(work)
    outcome = replay(events, work)
    controls = {kind: len(replay([event for event in events if event.kind != kind], work).wrong)
                for kind in ('sync', 'sync folder')}
    chosen = random.Random(0).sample(outcome.kept, min(args.resumes, len(outcome.kept)))  # noqa: S311
    different = [resume(state, whole) for state in chosen]
    kinds = [event.kind for event in events]
    known = machine()
    result = {
        'calls': {kind: kinds.count(kind) for kind in sorted(set(kinds))}, 'cuts': outcome.cuts,
        'states': outcome.states, 'distinct': outcome.distinct, 'not_recovered': outcome.wrong,
        'not_recovered_without': controls, 'resumed': len(chosen), 'resumed_equal': sum(not each for each in different),
        'different': [each for each in different if each], 'machine': known,
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')}
    text = json.dumps(result, indent=1) + '\n'
    print(text)
    if args.output:
        write_text(str(args.output), text)
    return int(bool(outcome.wrong) or any(different) or not all(controls.values()))


if __name__ == '__main__':
    sys.exit(main())
