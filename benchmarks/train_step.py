"""Times a training step of each variant against its plain base: `python -m benchmarks.train_step [-o FILE.json]`.

The third arm has a depthwise 7x7 convolution in the position of each pool. A step is forward, loss, backward and an SGD
update in fp32 on the same batch. The arms take turns; a ratio is the median over the turns of an arm's time over the
base's. Fresh pools reach far (half of the largest support), so that less is skipped than after training.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

import cpool_vision  # noqa: F401  registers the variants

from .markers import write_between
from .model_table import count
from .op import machine
from .turns import median_ratio, take_turns

BEGIN, END = '<!-- train-step -->', '<!-- /train-step -->'
# Model, its settings, and the ratio of times aimed at, if any.
CASES: tuple[tuple[str, dict[str, Any], float | None], ...] = (
    ('vit_small_cpool_patch16_224', {}, 1.10),
    ('vit_small_cpool_patch16_224', {'cpool_support_groups': 1}, 1.10),
    ('vit_small_cpool_patch16_224', {'cpool_groups': 1}, 1.04),
    ('resnet50_cpool', {}, 1.20),
    ('convnext_tiny_cpool', {}, 1.15),
    ('swin_tiny_cpool_patch4_window7_224', {}, None),
)


def make_step(name: str, batch: int, num_classes: int = 1000, **kwargs: Any) -> Callable[[], None]:
    """One training step of a model, on a batch of noise."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=num_classes, **kwargs).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    images = torch.randn(batch, *model.pretrained_cfg['input_size'])
    targets = torch.randint(num_classes, (batch,))

    def step() -> None:
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def run_case(
        name: str, settings: dict[str, Any], target: float | None, batch: int, repeats: int,
        clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    steps = {
        'base': make_step(name, batch, cpool_positions=[]),
        'variant': make_step(name, batch, **settings),
        'depthwise7': make_step(name, batch, cpool_mixer='depthwise7'),
    }
    rounds = take_turns(steps, repeats, clock=clock)
    _, base_params, base_macs = count(name, cpool_positions=[])
    _, params, macs = count(name, **settings)
    return {
        'model': name,
        'settings': settings,
        'batch': batch,
        **{f'{arm}_ms': statistics.median(times[arm] for times in rounds) * 1e3 for arm in steps},
        'ratio': median_ratio(rounds, 'variant', 'base'),
        'depthwise7_ratio': median_ratio(rounds, 'depthwise7', 'base'),
        'target_ratio': target,
        'params_change': params / base_params - 1,
        'macs_change': macs / base_macs - 1,
    }


def _label(row: dict[str, Any]) -> str:
    return ', '.join([f'`{row["model"]}`', *(f'`{name}={value}`' for name, value in row['settings'].items())])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ['| model | training step, variant / base | depthwise 7x7 / base | target, variant | parameters | MACs |',
             '|---|---|---|---|---|---|']
    for r in rows:
        target = '-' if r['target_ratio'] is None else f'{r["target_ratio"]:.2f}'
        lines.append(f'| {_label(r)} | {r["ratio"]:.2f} | {r["depthwise7_ratio"]:.2f} | {target} '
                     f'| {100 * r["params_change"]:+.1f} % | {100 * r["macs_change"]:+.1f} % |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, help='JSON file for the figures')
    parser.add_argument('-b', '--batch', type=int, default=8, help='images per step')
    parser.add_argument('-r', '--repeats', type=int, default=7, help='counted steps of each arm')
    parser.add_argument('--models', nargs='+', choices=sorted({name for name, *_ in CASES}), help='only these')
    parser.add_argument('--processor-time', action='store_true',
                        help='count the time of the processors instead of what passes: for a busy machine, one thread')
    parser.add_argument('--write', type=Path, help='Markdown file with the markers')
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    rows = [run_case(*case, args.batch, args.repeats, clock) for case in CASES
            if not args.models or case[0] in args.models]
    print(table(rows))
    if args.write:
        write_between(args.write, BEGIN, END, table(rows))
    if args.output:
        args.output.write_text(json.dumps({'machine': machine(), 'rows': rows}, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
