"""Runs a study of small nets, several seeds at once: `python -m benchmarks.study.stacked FILE.yaml -o OUT`.

Stop it at any time and call it again: it goes on at the last finished epoch, and runs with results are not repeated.
`--stack 6 --device cuda` trains six seeds of an arm side by side on a GPU; a CPU gains nothing from it, and has 1.
"""
import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpool_vision.profile.measure import machine

from ...markers import write_between
from ..report import draw, draw_contrasts, format_contrasts, format_table, summarize
from ..runner import read_results, restore, write_text
from ..spec import read_study
from .runs import Data, check_parameters, recipe_of, replay_ratios, run_stack_of, score_test, stacks, step_ratios


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.study.stacked', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder for data, states, weights and results')
    parser.add_argument(
        '--data-dir', type=Path, help='folder or tar archive of train/CLASS/* and validation/CLASS/*, for cifar10')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--stack', type=int, default=1, help='seeds that train side by side')
    parser.add_argument('--only', default='*', metavar='PATTERN', help='train these arms only')
    parser.add_argument('--minutes', type=float, help='begin no arm after so many minutes')
    parser.add_argument('--report', action='store_true', help='train nothing')
    parser.add_argument('--test', action='store_true', help='score the test images, once, when all runs are done')
    parser.add_argument('--time', action='store_true', help='time training steps of all arms, on an idle machine')
    parser.add_argument('--results', type=Path, help='JSON file that keeps the figures, as in benchmarks.study')
    parser.add_argument('--plot', type=Path, help='accuracy against cost goes here, the contrasts to *_contrasts.png')
    parser.add_argument(
        '--write', type=Path, help='Markdown with markers, as in benchmarks.study: STEM, STEM contrasts, STEM test')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    study = read_study(args.study)
    recipes = {name: recipe_of(study, arm) for name, arm in study.arms.items()}
    check_parameters(study)
    metric = next(iter(recipes.values())).metric
    device, output = torch.device(args.device), args.output
    data = Data(output, args.data_dir, device)
    failed: list[str] = []
    kept = json.loads(args.results.read_text(encoding='utf-8')) if args.results and args.results.exists() else {}
    restore(study, output, kept.get('runs', []))
    timing = output / 'timing.json'
    if args.time:
        ratios = step_ratios(study, data, args.stack, device)
        write_text(timing, json.dumps({
            'machine': machine(), 'device': str(device), 'stack': args.stack, 'ratios': ratios}, indent=1))
    if not args.report:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # what was finished is on the disk
        end = time.monotonic() + 60 * args.minutes if args.minutes else None
        for arm, seeds in stacks(study, output, args.stack, args.only):
            if end and time.monotonic() > end:
                break
            try:
                run_stack_of(study, arm, seeds, data, output, device)
            except Exception:  # the other arms need not be lost
                traceback.print_exc()
                failed.append(arm.name)
            if args.results:
                keep_results(args.results, {**kept, 'runs': read_results(study, output)})
    results = read_results(study, output)
    if not results:
        print('no run is finished yet')
        return 1
    timed = json.loads(timing.read_text(encoding='utf-8')) if timing.exists() else kept.get('timing', {})
    if not timed and device.type == 'cuda':
        ratios = replay_ratios(study, results)
        timed = {'machine': machine(), 'device': str(device), 'stack': args.stack, 'ratios': ratios}
    final = kept.get('final', {})
    if args.test and 'test' in final:
        raise SystemExit(f'the test images were scored before: the figures are in {args.results}')
    if args.test and len(results) < len(list(study.runs())):
        print('the test images are scored when all runs are done')
    elif args.test:
        final['test'] = score_test(study, output, data, device)
    tables = {}
    for split, rows in {'': results, **{f' {k}': v for k, v in final.items()}}.items():
        tables[f'{args.study.stem}{split}'] = format_table(
            summarize(study, rows, timed.get('ratios', {}), metric), metric)
        if study.contrasts:
            tables[f'{args.study.stem}{split} contrasts'] = format_contrasts(study, rows, metric)
    print(f'\n{study.title}: {len(results)} of {len(list(study.runs()))} runs\n\n' + '\n\n'.join(tables.values()))
    if args.results:
        keep_results(args.results, {**kept, 'timing': timed, 'runs': results, 'final': final})
    if args.plot:
        draw(study.title, summarize(study, results, timed.get('ratios', {}), metric), args.plot, metric)
        if study.contrasts:
            draw_contrasts(study, results, args.plot.with_name(f'{args.plot.stem}_contrasts.png'), metric)
    if args.write:
        page = args.write.read_text(encoding='utf-8')
        there = [name for name in tables if f'<!-- study {name} -->' in page]
        for name in there:
            write_between(args.write, f'<!-- study {name} -->', f'<!-- /study {name} -->', tables[name])
        if not there:
            raise SystemExit(f'{args.write} has no markers <!-- study {args.study.stem} -->: add them')
    if failed:
        print(f'these arms failed: {", ".join(failed)}')
    return 1 if failed else 0


def keep_results(place: Path, figures: dict[str, Any]) -> None:
    write_text(place, json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main())
