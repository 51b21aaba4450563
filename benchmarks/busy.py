"""Slowdown of the operator on a busy machine, by number of threads: `python -m benchmarks.busy [--write]`.

The operator (forward and backward, `native`) and a matrix product with its gradients alternate in a separate process,
alone and next to as many busy loops as there are processors, with one thread and with several. OpenMP threads wait for
each other at the end of every parallel region; on busy processors such a wait lasts a time slice of the scheduler, and
more if the threads spin (`OMP_WAIT_POLICY`). The slowdown is the median time under load over the time alone; a fair
scheduler gives 2. On a machine that has other work to do, the figures come out too low.
"""
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch

from cpool_vision.ops import context_pool2d
from cpool_vision.profile.cases import Case

from .markers import run_command

PAGE = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'performance.md'
SECONDS = 2.0
BUSY_LOOP = 'while True: pass'


def measure(seconds: float = SECONDS) -> dict[str, float]:
    """Median milliseconds of a call of each contender, in this process."""
    inputs, grad = Case((8, 384, 14, 14), (0.14, 1.4), groups=16, backward=True).inputs()
    for tensor in inputs:
        tensor.requires_grad_()
    a = torch.randn(1576, 384, requires_grad=True)
    b = torch.randn(384, 384, requires_grad=True)
    contenders = {
        'operator': lambda: context_pool2d(*inputs, backend='native').backward(grad),
        'product': lambda: (a @ b).sum().backward()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times['operator']) < 5:
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


def run(threads: int, busy: int, policy: str | None, seconds: float = SECONDS) -> dict[str, float]:
    """`measure` in a process with so many threads, beside `busy` busy loops."""
    environment = {k: v for k, v in os.environ.items() if k != 'OMP_WAIT_POLICY'} | {'OMP_NUM_THREADS': str(threads)}
    if policy is not None:
        environment['OMP_WAIT_POLICY'] = policy
    loops = [subprocess.Popen([sys.executable, '-c', BUSY_LOOP]) for _ in range(busy)]  # noqa: S603
    try:
        command = f'import json; from benchmarks.busy import measure; print(json.dumps(measure({seconds})))'
        done = subprocess.run(  # noqa: S603
            [sys.executable, '-c', command], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return json.loads(done.stdout.splitlines()[-1])


def make_table(seconds: float = SECONDS) -> str:
    """The table in Markdown."""
    processors = len(os.sched_getaffinity(0))
    lines = ['| threads | OMP_WAIT_POLICY | operator, slowdown | product, slowdown '
             '| operator under load, relative to one thread |', '|---:|---|---:|---:|---:|']
    one = None
    for threads, policy in ((1, None), (processors, None), (processors, 'passive')):
        alone, loaded = run(threads, 0, policy, seconds), run(threads, processors, policy, seconds)
        one = one or loaded
        slowdowns = ' | '.join(f'{loaded[name] / alone[name]:.1f}' for name in ('operator', 'product'))
        relative = loaded['operator'] / one['operator']
        lines.append(f'| {threads} | {policy or "not set"} | {slowdowns} | {relative:.2f} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    return run_command(argv, __doc__, PAGE, lambda: {'busy': make_table()})


if __name__ == '__main__':
    sys.exit(main())
