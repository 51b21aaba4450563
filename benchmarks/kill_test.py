"""Trains once undisturbed and once with SIGKILLs and resumes, and compares the two to the last bit.

    python -m benchmarks.kill_test --output DIR --kills 3 --nproc 2 -- --config FILE --data-dir DIR ...

Flags after `--` go to train.py; they should contain `--recovery-interval`, or every kill costs an epoch. A kill hits
all processes of the run, the data loading workers included, or one training process alone, which torchrun answers by
ending the others. Instants are drawn over the time that the undisturbed run took. `benchmarks.kill_campaign` does this
for many configurations. Compared are the last and the best
checkpoint (weights, average, optimizer, scaler, schedule, position), the pipeline of `--aug-config` in
augmentation.json, and summary.csv, updates.csv and supports.csv without what a clock measured.
Exit status 0 if they are equal and all kills hit. Needs /proc (Linux).
"""
import argparse
import csv
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from cpool_vision.engine.checkpoints.checkpoint import read_checkpoint
from cpool_vision.engine.checkpoints.resume import EXTENSION

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = ('undisturbed', 'killed')
_PATIENCE = 3600.


@dataclass
class Run:
    """A run of train.py in a folder of its own.

    Attributes:
        output: parent of the run folder and of the log.
        name: of the run folder.
        flags: of train.py.
        nproc: training processes.
    """

    output: pathlib.Path
    name: str
    flags: list[str]
    nproc: int = 1
    process: Any = field(default=None, init=False)
    former: int = field(default=0, init=False)

    @property
    def folder(self) -> pathlib.Path:
        """The run folder."""
        return self.output / self.name

    @property
    def log(self) -> pathlib.Path:
        """What all launches printed."""
        return self.output / f'{self.name}.log'

    def _stamp(self) -> int:
        path = self.folder / 'args.yaml'
        return path.stat().st_mtime_ns if path.exists() else 0

    def launch(self) -> None:
        """Starts or resumes the run."""
        self.former = self._stamp()
        self.process = self._spawn(
            [*self.flags, '--output', str(self.output), '--experiment', self.name, '--resume', 'auto'])

    def _spawn(self, flags: list[str]) -> Any:
        """Starts train.py; gives an object with `pid`, `poll` and `wait` as those of `subprocess.Popen`."""
        launcher = [] if self.nproc == 1 else ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node',
                                               str(self.nproc)]
        with open(self.log, 'ab') as log:
            return subprocess.Popen(  # noqa: S603
                [sys.executable, *launcher, str(ROOT / 'train.py'), *flags], stdout=log, stderr=log, cwd=ROOT)

    def opened(self) -> bool:
        """Whether the latest launch has opened the run folder."""
        return self._stamp() != self.former

    def wait_for_training(self) -> bool:
        """Waits until the run folder is open; False if the run ended before."""
        while not self.opened():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def _newest(self) -> int:
        return max((path.stat().st_mtime_ns for path in self.folder.glob(f'*{EXTENSION}')), default=0)

    def wait_for_checkpoint(self) -> bool:
        """Waits until the latest launch, which trains, has written a checkpoint; False if the run ended before."""
        former = self._newest()
        while self._newest() <= former:
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def finish(self) -> None:
        """Runs to the end.

        Raises:
            RuntimeError: the run failed.
        """
        self.launch()
        status = self.process.wait(_PATIENCE)
        if status:
            tail = self.log.read_text(errors='replace')[-2000:]
            raise RuntimeError(f'the {self.name} run ended with status {status}:\n{tail}')

    def seconds(self) -> float:
        """Time between the opening of the run folder and the last checkpoint, of a run in one go."""
        return (checkpoint_of(self.folder, 'last').stat().st_mtime_ns - self._stamp()) / 1e9

    def complete(self) -> bool:
        """Whether a launch came to the end."""
        return b'--result' in self.log.read_bytes()


def checkpoint_of(folder: pathlib.Path, stem: str) -> pathlib.Path:
    """The checkpoint of this name in a run folder."""
    return folder / (stem + EXTENSION)


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for entry in pathlib.Path('/proc').iterdir():
        if entry.name.isdecimal():
            try:
                text = (entry / 'stat').read_text()
            except OSError:  # gone in the meantime
                continue
            found.setdefault(int(text.rpartition(')')[2].split()[1]), []).append(int(entry.name))
    return found


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    table, found, waiting = _children(), [], [pid]
    while waiting:
        children = table.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError:
        return False


def _kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def kill(run: Run, one: bool, rng: random.Random) -> None:
    """Kills all processes of a run, or one training process alone, and waits for the end of the training processes.

    Workers of a single training process that is killed alone notice it within seconds, and end after this returns.
    """
    root = run.process.pid
    if one:
        trainers = [root] if run.nproc == 1 else _children().get(root, [])
        if trainers:
            _kill([rng.choice(sorted(trainers))])
            try:
                run.process.wait(60)
                return
            except subprocess.TimeoutExpired:
                pass
    _kill([root], signal.SIGSTOP)  # it shall not start others while they are listed
    pids = descendants(root)
    _kill([*pids, root])
    run.process.wait()
    while any(alive(pid) for pid in pids):
        time.sleep(0.002)


def flatten(value: Any, name: str = '') -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, item in items for path, leaf in flatten(item, f'{name}.{key}').items()}


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        raw = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (one, two)]
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)
    return type(one) is type(two) and (one == two or one != one and two != two)


def compare_checkpoints(one: pathlib.Path, two: pathlib.Path) -> tuple[int, list[str]]:
    """Number of entries in two checkpoints, and the names of those that are not equal bit for bit.

    Left out are the settings, which name folders and the checkpoint to resume from, and of the history the extensions.
    """
    sides = []
    for path in (one, two):
        content = read_checkpoint(str(path), 'checkpoint')
        sides.append(flatten({key: value for key, value in content.items() if key != 'args'}))
        for name, value in sides[-1].items():
            if name.startswith('.saver.checkpoint_files') and isinstance(value, str):
                sides[-1][name] = value.partition('.')[0]
    names = set(sides[0]) | set(sides[1])
    missing = object()
    return len(names), sorted(
        name for name in names if not _same(sides[0].get(name, missing), sides[1].get(name, missing)))


def read_rows(folder: pathlib.Path, name: str) -> list[dict[str, str]]:
    """Rows of a table without the images per second; none if there is no such file."""
    if not (folder / name).exists():
        return []
    with open(folder / name, newline='', encoding='utf-8') as file:
        return [{key: value for key, value in row.items() if 'per_sec' not in key} for row in csv.DictReader(file)]


def compare_runs(one: pathlib.Path, two: pathlib.Path) -> list[str]:
    """What differs between two run folders."""
    wrong = []
    for stem in ('last', 'model_best'):
        paths = checkpoint_of(one, stem), checkpoint_of(two, stem)
        name = paths[0].name
        count, unequal = compare_checkpoints(*paths)
        print(f'{name}: {count - len(unequal)} of {count} entries are equal bit for bit')
        wrong += [f'{name} {entry}' for entry in unequal]
    records = [path.read_text(encoding='utf-8') if path.exists() else '' for path in (
        folder / 'augmentation.json' for folder in (one, two))]
    if any(records):
        print(f'augmentation.json: {"equal" if records[0] == records[1] else "different"}')
    wrong += ['augmentation.json'] if records[0] != records[1] else []
    for name in ('summary.csv', 'updates.csv', 'supports.csv'):
        rows = read_rows(one, name), read_rows(two, name)
        equal = rows[0] == rows[1]
        if rows[0] or rows[1]:
            print(f'{name}: {len(rows[0])} rows, {"equal" if equal else "different"}')
        wrong += [] if equal else [name]
    return wrong


@dataclass(frozen=True)
class Kill:
    """A kill that hit a run.

    Attributes:
        seconds: since the launch, or since the run folder was opened.
        early: the launch had not opened the run folder yet.
        one: whether one training process was hit, not all.
        in_write: whether a file was left half written.
    """

    seconds: float
    early: bool
    one: bool
    in_write: bool


def run_killed(run: Run, kills: int, seconds: float, rng: random.Random, startup: float = 0.,
               early: float = 0., late: float = 0.) -> list[Kill]:
    """Trains with kills at random instants, then to the end.

    Args:
        run: the run.
        kills: how many.
        seconds: how long it takes undisturbed.
        rng: draws the instants.
        startup: seconds after a launch, about as long as it takes to open the run folder.
        early: share of the kills that are drawn over this time.
        late: share of the kills that wait until the launch has written a checkpoint, for runs that start slowly.

    Returns:
        The kills that hit a run that was not over.

    Raises:
        RuntimeError: the run failed.
    """
    hits: list[Kill] = []
    done = 0.  # instant up to which the run may have come
    for instant in sorted(rng.uniform(0, seconds) for _ in range(kills)):
        run.launch()
        soon = rng.random() < early
        wait = rng.uniform(0, startup) if soon else instant - done
        if soon or run.wait_for_training() and (not late or rng.random() >= late or run.wait_for_checkpoint()):
            time.sleep(wait)
        if run.process.poll() is not None or run.complete():
            break
        one, opened = rng.random() < 0.5, run.opened()
        kill(run, one, rng)
        done = done if soon else instant
        hits.append(Kill(wait, not opened, one, bool(list(run.folder.glob('.*tmp')))))
        print(f'kill {len(hits)}: {wait:.2f} s after {"the launch" if soon else "the start"}, '
              f'{"one process" if one else "all processes"}')
    if run.process is not None and run.process.poll() is None:  # over before its kill
        run.process.wait(_PATIENCE)
    run.finish()
    for line in re.findall(r'Resumed from .*|.*is damaged.*', run.log.read_text(errors='replace')):
        print(line)
    return hits


def main(argv: list[str] | None = None) -> int:
    """Runs the test and prints the verdict; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=pathlib.Path, required=True, help='empty folder for both runs')
    parser.add_argument('--kills', type=int, default=3, help='how many (default: 3)')
    parser.add_argument('--nproc', type=int, default=1, help='training processes, by torchrun if several (default: 1)')
    parser.add_argument('--seed', type=int, default=0, help='of the instants (default: 0)')
    parser.add_argument('flags', nargs='*', help='flags of train.py, after --')
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if any(args.output.iterdir()):
        parser.error(f'{args.output} is not empty: choose another --output')
    whole, killed = (Run(args.output, name, args.flags, args.nproc) for name in NAMES)
    whole.finish()
    hits = len(run_killed(killed, args.kills, whole.seconds(), random.Random(args.seed)))  # noqa: S311
    wrong = compare_runs(whole.folder, killed.folder)
    for name in wrong[:20]:
        print(f'different: {name}')
    if hits < args.kills:
        print(f'only {hits} of {args.kills} kills hit: the run was over before; try another --seed or a longer run')
    verdict = 'DIFFERENT' if wrong else f'EQUAL after {hits} kills'
    print(verdict)
    return int(bool(wrong) or hits < args.kills)


if __name__ == '__main__':
    sys.exit(main())
