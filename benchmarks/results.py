"""Validates finished training runs and tabulates them: `python -m benchmarks.results RUN... --data-dir DIR`.

Every run folder of train.py is measured by validate.py's own function, at its last checkpoint: choosing the best epoch
by the validation images would flatter. Pairs of a variant and its plain base are told apart by `cpool_positions`.
With `--write FILE` the table goes between the markers of that file.
"""
import argparse
import json
from pathlib import Path
from typing import Any

import timm

import cpool_vision  # noqa: F401  registers the variants
from cpool_vision.engine.settings.config import read_validate, read_yaml
from cpool_vision.engine.validate.run import validate

from .markers import write_between
from .model_table import count

BEGIN, END = '<!-- results -->', '<!-- /results -->'


def read_settings(run: Path) -> dict[str, Any]:
    """Settings of a run, by the names of train.py's flags."""
    settings = read_yaml(str(run / 'args.yaml'))
    return dict(settings, model_kwargs=settings['model_kwargs'] or {})


def measure(run: Path, data_dir: Path, split: str = 'validation') -> dict[str, Any]:
    """What the run was, and what its last checkpoint scores on all images of a split."""
    settings = read_settings(run)
    kwargs = settings['model_kwargs']
    argv = ['--model', settings['model'], '--checkpoint', str(run / 'last.pth.tar'), '--data-dir', str(data_dir),
            '--split', split, '--num-classes', str(settings['num_classes']), '--workers', '0', '--log-freq', '1000']
    for flag in ('mean', 'std', 'input_size'):
        if settings[flag]:
            argv += [f'--{flag.replace("_", "-")}', *map(str, settings[flag])]
    if settings['crop_pct']:
        argv += ['--crop-pct', str(settings['crop_pct'])]
    if kwargs:
        argv += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    row = validate(read_validate(argv))
    _, params, macs = count(settings['model'], num_classes=settings['num_classes'], **kwargs)
    epochs = (run / 'summary.csv').read_text(encoding='utf-8').strip().splitlines()
    train_images = sum(1 for _ in timm.data.create_reader('', str(Path(settings['data_dir']) / 'train')))
    return {
        'model': settings['model'],
        'arm': 'plain base' if kwargs.get('cpool_positions') == [] else 'context pool',
        'train_images': train_images,
        'epochs': len(epochs) - 1,
        'params': params,
        'macs': macs,
        'top1': row['top1'],
        'top5': row['top5'],
        'loss': row['loss'],
        'images': row['images'],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        '| model | arm | training images | epochs | parameters (M) | MACs (M) | top-1 (%) | top-5 (%) | loss |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    lines += [
        f'| `{r["model"]}` | {r["arm"]} | {r["train_images"]:,} | {r["epochs"]} | {r["params"] / 1e6:.3f} '
        f'| {r["macs"] / 1e6:.1f} | {r["top1"]:.2f} | {r["top5"]:.2f} | {r["loss"]:.3f} |'
        for r in rows
    ]
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--write', type=Path, help='Markdown file with the markers')
    parser.add_argument('-o', '--output', type=Path, help='JSON file for the figures')
    args = parser.parse_args()
    rows = [measure(run, args.data_dir) for run in args.runs]
    table = format_table(rows)
    print(table)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
    if args.write:
        write_between(args.write, BEGIN, END, table)


if __name__ == '__main__':
    main()
