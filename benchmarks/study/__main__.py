"""Runs a study and reports on it: `python -m benchmarks.study FILE.yaml --data-dir DIR -o OUT`.

Every run is train.py with exact resume: stop the command at any time and call it again, it goes on where it was. Runs
with results are not repeated. The table and the plot are made of what is finished.
"""
import argparse
import json
import sys
from pathlib import Path

from cpool_vision.profile.measure import machine

from ..markers import write_between
from .after import draw_supports, format_sizes, score_sizes
from .report import draw, format_table, summarize
from .runner import read_results, restore, run_missing, run_name, score_once, write_text
from .spec import read_study
from .timing import step_ratios


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.study', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', type=Path)
    parser.add_argument(
        '--data-dir', type=Path, help='holds train/CLASS/* and validation/CLASS/*; without it nothing is run')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder for runs, results, table and plot')
    parser.add_argument('-j', '--jobs', type=int, default=1, help='trainings at a time')
    parser.add_argument('--threads', type=int, default=1, help='of each training')
    parser.add_argument('--final-split', help='scores all runs on this split of DIR as well, once, when all are done')
    parser.add_argument('--time', action='store_true', help='time training steps of all arms first, on an idle machine')
    parser.add_argument('--batch', type=int, default=32, help='of the timed steps')
    parser.add_argument('--repeats', type=int, default=9, help='of the timed steps')
    parser.add_argument(
        '--sizes', type=int, nargs='+', metavar='PX', help='score the finished runs at these image sizes as well')
    parser.add_argument(
        '--results', type=Path,
        help='copies the figures, each with its machine, to this JSON file; runs that it holds with the same settings '
             'are done')
    parser.add_argument(
        '--plot', type=Path, help='draws here, and supports by depth to *_supports.png; OUT/study.png if not given')
    parser.add_argument(
        '--write', type=Path,
        help='Markdown file with the markers <!-- study STEM --> and <!-- /study STEM -->; other tables between STEM '
             'sizes and STEM SPLIT')
    return parser


def main() -> int:
    args = build_parser().parse_args()
    study = read_study(args.study)
    timing = args.output / 'timing.json'
    if args.time:
        ratios = step_ratios(study, args.batch, args.repeats)
        write_text(timing, json.dumps({'machine': machine(), 'batch': args.batch, 'ratios': ratios}, indent=1))
    kept = json.loads(args.results.read_text(encoding='utf-8')) if args.results and args.results.exists() else {}
    restore(study, args.output, kept.get('runs', []))
    failed = []
    for flag in ('final_split', 'sizes'):
        if getattr(args, flag) and not args.data_dir:
            raise SystemExit(f'--{flag.replace("_", "-")} needs --data-dir')
    if args.data_dir:
        try:
            failed = run_missing(study, args.output, args.data_dir.resolve(), args.jobs, args.threads)
        except KeyboardInterrupt:
            print('interrupted: call again to go on')
            return 143
    results = read_results(study, args.output)
    if not results:
        print('no run is finished yet')
        return 1
    final = kept.get('final', {})
    if args.final_split and not failed:
        if args.final_split in final:
            raise SystemExit(f'{args.final_split!r} was scored before: its figures are in {args.results}')
        try:
            final[args.final_split] = score_once(study, args.output, args.data_dir, args.final_split)
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
    timed = json.loads(timing.read_text(encoding='utf-8')) if timing.exists() else kept.get('timing', {})
    ratios = timed.get('ratios', {})
    rows = summarize(study, results, ratios)
    table = format_table(rows)
    print(f'\n{study.title}\n\n{table}')
    total = sum(len(arm.seeds) for arm in study.arms.values())
    if len(results) < total:
        print(f'\n{len(results)} of {total} runs are finished')
    write_text(args.output / 'table.md', table + '\n')
    tables = {args.study.stem: table}
    for split, scored in final.items():
        tables[f'{args.study.stem} {split}'] = format_table(summarize(study, scored, ratios))
        print(f'\n{split}\n\n{tables[f"{args.study.stem} {split}"]}')
    sizes = kept.get('sizes', [])
    if args.sizes:
        here = [run_name(r['arm'], r['seed']) for r in results]
        names = [name for name in here if (args.output / 'runs' / name).exists()]
        sizes = score_sizes(study, args.output, names, args.data_dir, args.sizes)
    if sizes:
        tables[f'{args.study.stem} sizes'] = format_sizes(study, sizes)
        print(f'\n{tables[f"{args.study.stem} sizes"]}')
    if args.results:
        write_text(args.results, json.dumps(
            {'timing': timed, 'runs': results, 'sizes': sizes, 'final': final}, indent=1) + '\n')
    plot = args.plot or args.output / 'study.png'
    draw(study.title, rows, plot)
    draw_supports(study, results, plot.with_name(f'{plot.stem}_supports.png'))
    if args.write:
        for name, text in tables.items():
            write_between(args.write, f'<!-- study {name} -->', f'<!-- /study {name} -->', text)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
