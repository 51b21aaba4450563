"""Measures the operator and its variants on a CUDA device: `python -m benchmarks.gpu -o OUT.json`.

Needs torch, triton, timm and this checkout, and downloads nothing. What matters most comes first, every result is
written as soon as it is there, and what the time allowed (`--budget`) does not suffice for is listed as skipped:

1. the kernels' tests, in parallel where pytest-xdist is installed, while the kernels of all cases and models compile;
2. the operator and a depthwise convolution on every case;
3. layers, the operator with its predictor under autocast;
4. training steps in eager mode, against the base and against a depthwise convolution in the same slot, and their
   kernels, from which the tables show where a variant's time goes;
5. what else could stand in the operator's place: dense eager, attention, FlexAttention, deformable convolution;
6. compiled training steps.

`--parts steps others` measures these parts alone, in this order. `python -m benchmarks.gpu.tables OUT.json --write`
puts the tables into docs/performance.md.
"""
import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpool_vision.profile.cases import Case
from cpool_vision.profile.measure import device_info, machine

from . import layer, operator, steps
from .compile import arch_of, compile_kernels

ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(f'tests/ops/test_triton_{name}.py' for name in ('kernels', 'maps', 'predictor'))
PARTS = 'operator', 'layers', 'steps', 'others', 'compiled'
# Seconds that one measurement is expected to take at most: none begins with less left.
_SECONDS = {'operator': 3.0, 'other': 12.0, 'step': 12.0, 'compiled': 70.0}


def run_tests(seconds: float) -> dict[str, Any]:
    """The kernels' tests in a process of their own: the last line of what they say, and the failures."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *TESTS]
    if importlib.util.find_spec('xdist') is not None:
        command += ['-n', str(min(15, os.cpu_count() or 1)), '--dist', 'worksteal']
    try:
        out = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, cwd=ROOT, timeout=seconds).stdout
    except subprocess.TimeoutExpired:
        return {'summary': f'not finished after {seconds:.0f} s', 'failures': []}
    lines = out.strip().splitlines() or ['no output']
    return {'summary': lines[-1], 'failures': re.findall(r'^(?:FAILED|ERROR) (.*)', out, re.MULTILINE)[:20]}


def _release(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.device(device).type == 'cuda':
        torch.cuda.empty_cache()


class Session:
    """Results so far, in a file that is whole after every measurement."""

    def __init__(self, path: Path, device: str, budget_s: float):
        self.path, self.device, self.budget_s, self.start = path, device, budget_s, time.monotonic()
        self.results: dict[str, Any] = {
            'machine': machine() | device_info(device), 'operator': {}, 'layers': [], 'steps': {}, 'skipped': []}
        self.save()

    def left(self) -> float:
        return self.budget_s - (time.monotonic() - self.start)

    def save(self) -> None:
        whole = self.path.with_name(self.path.name + '.part')
        whole.write_text(json.dumps(self.results, indent=1) + '\n', encoding='utf-8')
        whole.replace(self.path)

    def measure(self, what: str, expected_s: float, rows: list[dict[str, Any]],
                run: Callable[[], dict[str, Any]]) -> None:
        """Adds a row, or says what went wrong in it; or lists it as skipped."""
        if self.left() < expected_s:
            self.results['skipped'].append(what)
            self.save()
            return
        try:
            rows.append(run())
        except Exception as error:  # one that cannot run must not cost the others their figures
            rows.append({'implementation': what, 'failed': f'{type(error).__name__}: {error}'[:300]})
        print(f'{time.monotonic() - self.start:5.0f} s  {what}', flush=True)
        self.save()


def _operators(session: Session, cases: dict[str, Case], names: tuple[str, ...], expected: float, repeats: int) -> None:
    for title, case in cases.items():
        rows = session.results['operator'].setdefault(title, [])
        if session.left() < expected:
            session.results['skipped'] += [f'{title}: {name}' for name in names]
            continue
        prepared = operator.Prepared.make(case)
        for name in names:
            session.measure(f'{title}: {name}', expected, rows,
                            functools.partial(operator.measure, prepared, name, repeats))
        del prepared
        _release(session.device)


def _layers(session: Session, layers: dict[str, tuple[tuple[int, ...], int]], expected: float, repeats: int) -> None:
    for name, (shape, groups) in layers.items():
        session.measure(f'layer: {name}', expected, session.results['layers'],
                        functools.partial(layer.measure, name, shape, groups, session.device, repeats))
        _release(session.device)


def _steps(session: Session, models: tuple[tuple[str, int, float], ...], arms: tuple[str, ...], compiled: bool,
           repeats: int) -> None:
    for name, batch, _ in models:
        mode = 'compiled' if compiled else 'eager'
        rows = session.results['steps'].setdefault(f'{name} {mode}', [])
        for arm in arms:
            session.measure(
                f'{name} {mode}: {arm}', _SECONDS['compiled' if compiled else 'step'], rows,
                functools.partial(steps.measure, name, arm, batch, session.device, repeats, compiled))
            _release(session.device)


def _parts(session: Session, args: argparse.Namespace, cases: dict[str, Case]) -> dict[str, Callable[[], None]]:
    """What can be measured, by name, in the order of importance."""
    scale = 0.0 if args.tiny else 1.0
    models = steps.TINY_MODELS if args.tiny else steps.MODELS
    layers = layer.TINY_LAYERS if args.tiny else layer.LAYERS
    n = args.repeats
    return {
        'operator': lambda: _operators(session, cases, operator.FIRST, scale * _SECONDS['operator'], n),
        'layers': lambda: _layers(session, layers, scale * _SECONDS['operator'], n),
        'steps': lambda: _steps(session, models, tuple(steps.ARMS), False, n),
        'others': lambda: _operators(session, cases, operator.OTHERS, scale * _SECONDS['other'], n),
        'compiled': lambda: _steps(session, models, ('base', 'variant'), True, n),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs everything that the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, required=True, help='JSON file for the figures')
    parser.add_argument('--budget', type=float, default=340.0, help='seconds in all')
    parser.add_argument('--device', default='cuda', help='cuda, cuda:N, or cpu with --tiny')
    parser.add_argument('--tiny', action='store_true', help='one small case and model: tries the command itself')
    parser.add_argument('--no-tests', action='store_true', help='leave the tests out')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='what to measure, in this order')
    parser.add_argument('--repeats', type=int, default=10, help='counted runs of each')
    args = parser.parse_args(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: torch {torch.__version__} sees no CUDA device; '
                     'use --tiny --device cpu to try the command without one')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    cases = {title: dataclasses.replace(case, device=args.device)
             for title, case in (operator.TINY_CASES if args.tiny else operator.CASES).items()}
    session = Session(args.output, args.device, args.budget)
    if args.device.startswith('cuda'):
        workers = compile_kernels(cases.values(), arch_of(args.device))
        if 'steps' in args.parts:
            for name, *_ in steps.MODELS:
                workers.submit(steps.warm_up, name, args.device)
        if not args.no_tests:
            session.results['tests'] = run_tests(min(100.0, session.left() / 3))
            print(session.results['tests']['summary'], flush=True)
            session.save()
        workers.shutdown()
    parts = _parts(session, args, cases)
    for name in args.parts:
        parts[name]()
    session.results['seconds'] = time.monotonic() - session.start
    session.save()
    print(f'figures in {args.output}; {len(session.results["skipped"])} measurements skipped')
    return 0


if __name__ == '__main__':
    sys.exit(main())
