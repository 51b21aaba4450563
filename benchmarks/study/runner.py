"""Runs what is missing of a study, some runs at a time, and scores what is finished."""
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from cpool_vision import files
from cpool_vision.profile.measure import machine

from .spec import Study

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.5
_SUPPORT_COLUMNS = ('mean', 'q05', 'q50', 'q95')


class StaleRunError(ValueError):
    """A run in the output folder was made with other settings than the study's."""


def write_text(path: Path, text: str) -> None:
    """Replaces `path` as a whole, so that an interruption leaves what was there; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(str(path), text)


def run_name(arm: str, seed: int) -> str:
    return f'{arm}-s{seed}'


def prepare(study: Study, output: Path, data_dir: Path) -> list[str]:
    """Writes the config of every run and returns the names of those without a result.

    Raises:
        StaleRunError: a run was begun with other settings; nothing is overwritten.
    """
    missing = []
    for arm, seed in study.runs():
        name = run_name(arm.name, seed)
        config = output / 'configs' / f'{name}.yaml'
        text = yaml.safe_dump(dict(study.run_settings(arm, seed), data_dir=str(data_dir)))
        if config.exists() and config.read_text(encoding='utf-8') != text:
            raise StaleRunError(
                f'{config} holds other settings than the study: name another output folder, or remove '
                f'{config}, {output / "runs" / name} and its result')
        write_text(config, text)
        if not result_file(output, name).exists():
            missing.append(name)
    return missing


def fingerprint(study: Study, arm: str, seed: int) -> str:
    """Hash of a run's settings."""
    text = json.dumps(study.run_settings(study.arms[arm], seed), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def restore(study: Study, output: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Takes figures of an earlier call, made elsewhere perhaps, for those runs whose settings are still the same.

    Returns:
        Number of runs that need not be done again.
    """
    restored = 0
    wanted = {run_name(arm.name, seed): fingerprint(study, arm.name, seed) for arm, seed in study.runs()}
    for row in rows:
        name = run_name(row['arm'], row['seed'])
        if name in wanted and row.get('settings') == wanted[name] and not result_file(output, name).exists():
            write_text(result_file(output, name), json.dumps(row, indent=1) + '\n')
            restored += 1
    return restored


def result_file(output: Path, name: str) -> Path:
    return output / 'results' / f'{name}.json'


def _start(output: Path, name: str, threads: int) -> subprocess.Popen[bytes]:
    log = output / 'logs' / f'{name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(ROOT / 'train.py'), '--config', str(output / 'configs' / f'{name}.yaml'),
        '--output', str(output / 'runs'), '--experiment', name, '--resume', 'auto']
    with open(log, 'ab') as file:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        return subprocess.Popen(  # noqa: S603  our own script
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def score(output: Path, name: str, data_dir: Path, split: str = 'validation') -> dict[str, Any]:
    """What the last checkpoint of a finished run scores on a split, and the machine that says so."""
    from ..results import measure  # the engine, which stacked studies do without

    arm, _, seed = name.rpartition('-s')
    return dict(measure(output / 'runs' / name, data_dir, split), arm=arm, seed=int(seed), machine=machine())


def score_once(study: Study, output: Path, data_dir: Path, split: str) -> list[dict[str, Any]]:
    """Scores every run on a split that nothing was chosen by, once: the figures are kept and never made again.

    Raises:
        RuntimeError: a run has no result yet, or the split was scored before.
    """
    names = [run_name(arm.name, seed) for arm, seed in study.runs()]
    missing = [name for name in names if not result_file(output, name).exists()]
    if missing:
        raise RuntimeError(
            f'{split!r} is scored when all runs are done, and {missing[0]} is not: finish the study first')
    kept = output / f'{split}.json'
    if kept.exists():
        raise RuntimeError(f'{split!r} was scored before: its figures are in {kept}')
    results = [score(output, name, data_dir, split) for name in names]
    write_text(kept, json.dumps(results, indent=1) + '\n')
    return results


def run_missing(
        study: Study, output: Path, data_dir: Path, jobs: int, threads: int,
        report: Callable[[str], None] = print) -> list[str]:
    """Trains and scores every run that has no result. Interrupted, it stops the runs at a step and keeps their place.

    Returns:
        Names of the runs that failed; their output is in `output/logs`.

    Raises:
        KeyboardInterrupt: on SIGINT or SIGTERM, once the running trainings have saved and ended.
        StaleRunError: see `prepare`.
    """
    waiting = prepare(study, output, data_dir)
    report(f'{len(waiting)} runs to do')
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    before = signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = _start(output, name, threads)
                report(f'{name}: started')
            time.sleep(_POLL_S)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    failed.append(name)
                    report(f'{name}: failed with status {process.returncode}, see {output / "logs" / name}.log')
                    continue
                row = score(output, name, data_dir)
                write_text(result_file(output, name), json.dumps(row, indent=1) + '\n')
                report(f'{name}: top-1 {row["top1"]:.2f} %, {len(waiting) + len(running)} runs left')
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt() -> None:
    raise KeyboardInterrupt


def learned_supports(run: Path) -> dict[str, list[float]]:
    """Supports on the first validation batch after the last epoch: mean and quantiles in image pixels, by layer."""
    file = run / 'supports.csv'
    if not file.exists():
        return {}
    with open(file, newline='', encoding='utf-8') as lines:
        rows = list(csv.DictReader(lines))
    last = max((int(row['epoch']) for row in rows), default=0)
    return {
        row['layer']: [round(float(row[key]), 4) for key in _SUPPORT_COLUMNS]
        for row in rows if int(row['epoch']) == last}


def read_results(study: Study, output: Path) -> list[dict[str, Any]]:
    """Figures of the finished runs, in the order of the study, with a hash of their settings and what they learned.

    Raises:
        StaleRunError: a run had other settings than the study gives it now.
    """
    rows = []
    for arm, seed in study.runs():
        name = run_name(arm.name, seed)
        file = result_file(output, name)
        if file.exists():
            row = json.loads(file.read_text(encoding='utf-8'))
            settings = fingerprint(study, arm.name, seed)
            if row.setdefault('settings', settings) != settings:
                raise StaleRunError(f'{file} comes from other settings than the study: use another folder or remove it')
            row.setdefault('supports', learned_supports(output / 'runs' / name))
            rows.append(row)
    return rows
