"""Kills runs of many configurations, hundreds of times, and compares each with the undisturbed run bit for bit.

    OMP_NUM_THREADS=1 python -m benchmarks.kill_campaign run --work DIR --kills 500     # adds to the committed results
    python -m benchmarks.kill_campaign table --write                                    # table in the page

Each round trains one configuration with SIGKILLs at random instants and `--resume auto`, to its end. Some of the kills
hit before the run folder is opened; half of them hit all processes of the run, the others one training process alone.
The runs are `train.py` in a process of its own, forked from this one, which has imported PyTorch and computes nothing:
a launch then takes a fraction of a second. Two processes meet as under torchrun, and end as under torchrun when one of
them is killed; kills under torchrun itself are those of `benchmarks.kill_test`. The results are written after every
round, and a campaign that was interrupted goes on with the next one.
"""
import argparse
import contextlib
import datetime
import gc
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

from cpool_vision.cli import train
from cpool_vision.engine.checkpoints.checkpoint import read_checkpoint
from cpool_vision.engine.checkpoints.saver import SCALER_KEY
from cpool_vision.engine.train import fit  # noqa: F401  what every launch would import
from cpool_vision.files import write_text
from cpool_vision.profile.measure import machine

from .kill_test import NAMES, ROOT, Run, checkpoint_of, compare_runs, run_killed
from .markers import run_command

RESULTS = ROOT / 'benchmarks' / 'results' / 'kills.json'
PAGE = ROOT / 'docs' / 'fault_tolerance.md'
MARKER = 'kills-table'
EARLY, STARTUP = 0.15, 1.  # share of the kills that hit within so many seconds after the launch
LATE = 0.3  # share of the other kills that wait for a checkpoint of the launch
GRACE = 30.  # seconds that torchrun gives the others when one process has ended

COMMON = [
    '--num-classes', '10', '--img-size', '32', '--epochs', '3', '--warmup-epochs', '1', '--opt', 'adamw', '--lr',
    '1e-3', '--device', 'cpu', '--recovery-interval', '2', '--log-interval', '1000', '--no-tensorboard']
SHAPES = ['--dataset', 'cpool/shapes', '--train-num-samples', '48', '--val-num-samples', '15']
RESNET = ['--model', 'resnet_micro_cpool_32', '--drop', '0.2', '-b', '4', '-j', '1']
VIT = ['--model', 'vit_micro_cpool_patch4_32', '--model-kwargs', 'depth=2', '--drop', '0.1', '-b', '4', '-j', '1']
AVERAGE = ['--model-ema', '--model-ema-decay', '0.9']
MIXED = ['--mixup', '0.2', '--cutmix', '1', '--reprob', '0.5']


@dataclass(frozen=True)
class Configuration:
    """Flags of train.py for one way to train, and how many processes it takes."""

    flags: tuple[str, ...]
    nproc: int = 1


def _of(*parts: list[str], nproc: int = 1) -> Configuration:
    return Configuration(tuple(flag for part in (*parts, COMMON) for flag in part), nproc)


CONFIGURATIONS = {
    'single': _of(RESNET, SHAPES, AVERAGE, MIXED, ['--aa', 'rand-m5-mstd0.5']),
    'accumulation': _of(RESNET, SHAPES, AVERAGE, ['--grad-accum-steps', '3', '--clip-grad', '1', '--sched-on-updates']),
    'bfloat16': _of(VIT, SHAPES, AVERAGE, ['--amp', '--amp-dtype', 'bfloat16', '--reprob', '0.5']),
    'float16, skipped step': _of(VIT, SHAPES, AVERAGE, ['--amp', '--amp-dtype', 'float16', '--bce-loss', '--bce-sum']),
    'albumentations': _of(RESNET, SHAPES, AVERAGE, MIXED, ['--aug-config', 'strong']),
    'NaFlex': _of(SHAPES, AVERAGE, [
        '--model', 'naflexvit_base_patch16_gap', '--model-kwargs', 'embed_dim=16', 'depth=1', 'num_heads=2',
        'patch_size=8', '--naflex-loader', '--naflex-train-seq-lens', '4', '9', '--naflex-max-seq-len', '16',
        '--reprob', '0.5', '-b', '4', '-j', '1']),
    'multi-label': _of(RESNET, AVERAGE, ['--task', 'multi_label', '--data-dir', 'LABELS']),
    'two processes': _of(RESNET, SHAPES, AVERAGE, MIXED, ['--grad-accum-steps', '2'], nproc=2),
    'FSDP, two processes': _of(VIT, SHAPES, AVERAGE, ['--fsdp', '--grad-accum-steps', '2'], nproc=2),
}


def paint_labels(folder: pathlib.Path) -> None:
    """A set with several labels per image: noise with a bright stripe for each of ten labels."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 48), ('validation', 15)):
        (folder / split).mkdir(parents=True)
        lines = ['file_name,labels']
        for index in range(count):
            chosen = np.flatnonzero(rng.random(10) < 0.3) if index else np.arange(10)
            pixels = rng.integers(0, 120, (32, 32, 3))
            for label in chosen:
                pixels[3 * label:3 * label + 3] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f'{index}.png')
            lines.append(f'{index}.png,{"|".join(f"stripe{label}" for label in chosen)}')
        (folder / split / 'labels.csv').write_text('\n'.join(lines) + '\n')


def _train(flags: list[str], log: pathlib.Path, environment: dict[str, str]) -> None:
    """What a forked process does: a run of train.py."""
    with open(log, 'ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    status = train.main(flags)
    sys.stdout.flush()
    os._exit(status)


def _train_two(flags: list[str], log: pathlib.Path, nproc: int) -> None:
    """What torchrun does: starts the processes, and ends the others when one fails."""
    common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(get_free_port()), 'WORLD_SIZE': str(nproc),
              'LOCAL_WORLD_SIZE': str(nproc)}
    context = get_context('fork')
    ranks = [context.Process(target=_train, args=(flags, log, {**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}))
             for rank in range(nproc)]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.005)
    failed = any(rank.exitcode for rank in ranks)
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + GRACE
        for rank in ranks:
            if rank.is_alive():
                os.kill(int(rank.pid or 0), number)
        for rank in ranks:
            rank.join(max(0., end - time.monotonic()))
    os._exit(int(failed))


class _Forked:
    """A process of `multiprocessing` with the methods of `subprocess.Popen`."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired('train.py', timeout or 0.)
        return status


class ForkedRun(Run):
    """A run whose processes are forked from this one."""

    def _spawn(self, flags: list[str]) -> _Forked:
        target: Callable[..., None] = _train if self.nproc == 1 else _train_two
        more: Any = {} if self.nproc == 1 else self.nproc
        process = get_context('fork').Process(target=target, args=(flags, self.log, more))
        process.start()
        return _Forked(process)


def check_skipped(folder: pathlib.Path) -> None:
    """Makes sure that the scale of the loss has come down, as it does when a step is skipped.

    Raises:
        RuntimeError: it has not.
    """
    state: Any = read_checkpoint(str(checkpoint_of(folder, 'last')), 'checkpoint')[SCALER_KEY]
    scale = state['scale']
    if scale >= torch.amp.GradScaler('cpu').state_dict()['scale']:
        raise RuntimeError(f'no step was skipped: the scale of the loss is {scale}')


def prepare(work: pathlib.Path, name: str) -> ForkedRun:
    """The undisturbed run of a configuration, made unless it is there."""
    labels = work / 'labels'
    if not labels.exists():
        paint_labels(work / 'labels.new')
        os.replace(work / 'labels.new', labels)
    configuration = CONFIGURATIONS[name]
    flags = [str(labels) if flag == 'LABELS' else flag for flag in configuration.flags]
    output = work / name.replace(', ', '-').replace(' ', '-')
    whole = ForkedRun(output, NAMES[0], flags, configuration.nproc)
    if not (whole.log.exists() and whole.complete()):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        whole.finish()
    if 'float16' in flags:
        check_skipped(whole.folder)
    return whole


def run_round(whole: ForkedRun, kills: int, seed: int) -> dict[str, Any]:
    """One run with kills, compared with the undisturbed one: a row of the results."""
    killed = ForkedRun(whole.output, NAMES[1], whole.flags, whole.nproc)
    shutil.rmtree(killed.folder, ignore_errors=True)
    killed.log.unlink(missing_ok=True)
    begin = time.monotonic()
    hits, failure, rng = [], '', random.Random(f'{whole.output.name} {seed}')  # noqa: S311
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            hits = run_killed(killed, kills, whole.seconds(), rng, STARTUP, EARLY, LATE)
            different = compare_runs(whole.folder, killed.folder)
            different += [f'left over: {path.name}' for path in killed.folder.glob('.*')]
        except (RuntimeError, OSError):
            failure, different = traceback.format_exc()[-2000:], []
    log = killed.log.read_text(errors='replace')
    return {
        'kills': len(hits), 'early': sum(hit.early for hit in hits), 'one_process': sum(hit.one for hit in hits),
        'half_written': sum(hit.in_write for hit in hits), 'resumes': log.count('Resumed from'),
        'damaged': log.count('is damaged'), 'different': different, 'failure': failure,
        'seconds': round(time.monotonic() - begin, 1)}


def campaign(work: pathlib.Path, results: pathlib.Path, kills: int, per_run: int, names: list[str]) -> bool:
    """Adds rounds to the results, each to the configuration with the fewest kills, until there are so many kills.

    Returns:
        Whether all rounds, earlier ones included, ended as the undisturbed run.
    """
    rounds = json.loads(results.read_text(encoding='utf-8'))['rounds'] if results.exists() else []
    while True:
        count = {name: sum(row['kills'] for row in rounds if row['configuration'] == name) for name in names}
        left = kills - sum(count.values())
        if left <= 0 or any(row['failure'] or row['different'] for row in rounds[-1:]):
            break
        name = min(names, key=lambda each: count[each])
        seed = sum(row['configuration'] == name for row in rounds)
        row = run_round(prepare(work, name), min(per_run, left), seed)
        known = machine()
        rounds.append({'configuration': name, 'seed': seed, **row, 'commit': known.pop('commit'),
                       'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')})
        write_text(str(results), json.dumps({'machine': known, 'rounds': rounds}, indent=1) + '\n')
        verdict = row['failure'] or row['different'][:9] or 'equal'
        print(f'{sum(count.values()) + row["kills"]} of {kills} kills; {name}, {row["kills"]} kills in '
              f'{row["seconds"]} s, {row["resumes"]} resumes: {verdict}', flush=True)
    return not any(row['failure'] or row['different'] for row in rounds)


def make_table(results: pathlib.Path = RESULTS) -> str:
    """The results by configuration, in Markdown."""
    content = json.loads(results.read_text(encoding='utf-8'))
    lines = ['| configuration | runs | kills | before the run folder was open | of one process alone '
             '| with a file half written | resumes | runs equal bit for bit |', '|---|---|---|---|---|---|---|---|']
    total: list[int] = []
    for name in CONFIGURATIONS:
        rows = [row for row in content['rounds'] if row['configuration'] == name]
        equal = sum(not row['different'] and not row['failure'] for row in rows)
        figures = [len(rows), *(sum(row[key] for row in rows) for key in (
            'kills', 'early', 'one_process', 'half_written', 'resumes')), equal]
        total = [one + two for one, two in zip(total or [0] * len(figures), figures, strict=True)]
        lines.append(f'| {name} | {" | ".join(map(str, figures))} |')
    lines.append(f'| all | {" | ".join(map(str, total))} |')
    dates = sorted(row['date'][:10] for row in content['rounds'])
    commits = sorted({str(row['commit'])[:7] for row in content['rounds']})
    known = content['machine']
    when = ' to '.join(dict.fromkeys((dates[0], dates[-1])))
    lines += ['', f'{when}, commit {", ".join(commits)}, torch {known["torch"]}, {known["cpu"]}.']
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign, or prints its table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['table']:
        return run_command(argv[1:], __doc__, PAGE, lambda: {MARKER: make_table()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('action', choices=('run', 'table'), help='kill runs, or make the table')
    parser.add_argument('--work', type=pathlib.Path, required=True, help='folder of the runs; those in it are used')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS, help='JSON to add to')
    parser.add_argument('--kills', type=int, default=500, help='in all, earlier ones included (default: 500)')
    parser.add_argument('--per-run', type=int, default=10, help='kills of one run (default: 10)')
    parser.add_argument('--only', nargs='+', default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS), metavar='NAME',
                        help='configurations (default: all)')
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()  # what was imported is not searched for garbage in every process
    return int(not campaign(args.work.resolve(), args.results, args.kills, args.per_run, args.only))


if __name__ == '__main__':
    sys.exit(main())
