"""What trained pools rest on: `python -m benchmarks.study.stacked.probes FILE.yaml -o OUT --only PATTERN`.

Scores finished runs again, without training, with one part of every pool exchanged: the supports of another image,
their mean over a batch of images and all places, or the weights of another image. An exchange that costs nothing shows
a part that says nothing about the image. For dense tasks also the correlation of the support with the radius of the
object that a cell lies on.
"""
import argparse
import fnmatch
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpool_vision.layers import ContextPool2d
from cpool_vision.profile.measure import machine

from ...markers import write_between
from ..report import format_interval, paired_interval
from ..runner import result_file, run_name, write_text
from ..spec import Study, read_study
from .runs import Data, batch_of, load_net, recipe_of
from .score import score_stack
from .tasks import Recipe, Split, normalize

Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
EXCHANGES: dict[str, Exchange] = {
    'none': lambda weights, sigma: (weights, sigma),
    'supports of another image': lambda weights, sigma: (weights, sigma.roll(1, 0)),
    'mean supports': lambda weights, sigma: (weights, sigma.mean((0, 2, 3), keepdim=True).expand_as(sigma)),
    'weights of another image': lambda weights, sigma: (weights.roll(1, 0), sigma),
}


def pools_of(net: nn.Module) -> list[ContextPool2d]:
    """Context pools of the net, from the input on."""
    return [module for module in net.modules() if isinstance(module, ContextPool2d)]


def pass_maps_through(pool: ContextPool2d, function: Exchange) -> None:
    """Whatever weights and supports the pool makes go through `function`, until `undo_pass`."""
    make = pool.read_maps
    pool.read_maps = lambda *args: function(*make(*args))  # type: ignore[method-assign]
    pool.fused = False  # which would make the maps and pool at once


def undo_pass(pool: ContextPool2d) -> None:
    """Undoes `pass_maps_through`."""
    del pool.read_maps
    pool.fused = True


def exchange_maps(net: nn.Module, exchange: Exchange) -> Callable[[], None]:
    """Passes weights and supports of every pool through `exchange`, until the function returned is called."""
    pools = pools_of(net)
    for pool in pools:
        pass_maps_through(pool, exchange)

    def undo() -> None:
        for pool in pools:
            undo_pass(pool)
    return undo


def radius_correlations(net: nn.Module, split: Split) -> list[float | None]:
    """Pearson correlation, pool by pool, of the mean support over groups with the radius of the object of a cell.

    A cell lies on the object that its middle pixel shows; cells on the ground are left out. None if all supports are
    one.

    Raises:
        ValueError: the images have no radii.
    """
    if split.radii is None:
        raise ValueError('images without radii of objects have no correlation: take a dense task')
    seen: list[list[Tensor]] = [[] for _ in pools_of(net)]

    for k, pool in enumerate(pools_of(net)):
        def note(weights: Tensor, sigma: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
            seen[k].append(sigma.mean(1))
            return weights, sigma
        pass_maps_through(pool, note)
    with torch.no_grad():
        for images in split.images.split(100):
            net(normalize(images))
    found: list[float | None] = []
    for pool, maps in zip(pools_of(net), seen, strict=True):
        undo_pass(pool)
        sigma = torch.cat(maps)
        step = split.radii.shape[-1] // sigma.shape[-1]
        radius = split.radii[:, step // 2::step, step // 2::step].float()
        on = radius > 0
        constant = bool(sigma.amax() - sigma.amin() < 1e-5 * sigma.amax())
        found.append(None if constant else float(torch.corrcoef(torch.stack([sigma[on], radius[on]]))[0, 1]))
    return found


def probe(net: nn.Module, recipe: Recipe, split: Split) -> dict[str, Any]:
    """Scores of a net in percent under every exchange, and correlations where the task is dense."""
    row: dict[str, Any] = {}
    for name, exchange in EXCHANGES.items():
        undo = exchange_maps(net, exchange)
        score, = score_stack(
            lambda x: net(normalize(x))[None], 1, recipe, split, batch_of(split.images.device))
        undo()
        row[name] = score[recipe.metric]
    if recipe.dense:
        row['correlations'] = radius_correlations(net, split)
    return row


def format_probes(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: differences to the net as it is, paired by seed, and the correlations' mean over seeds by pool."""
    names = [name for name in EXCHANGES if name != 'none']
    lines = ['| arm | seeds | as trained (%) | ' + ' | '.join(names) + ' | correlation with radius, by pool |',
             '|---|---:|---:|' + '---|' * len(names) + '---|']
    for arm in dict.fromkeys(row['arm'] for row in rows):
        own = [row for row in rows if row['arm'] == arm]
        cells = []
        for name in names:
            interval = paired_interval([row[name] - row['none'] for row in own])
            cells.append('-' if interval is None else format_interval(*interval))
        layers = zip(*(row.get('correlations', []) for row in own), strict=True)
        correlations = ', '.join('-' if None in layer else f'{statistics.mean(layer):+.2f}' for layer in layers) or '-'
        score = statistics.mean(row['none'] for row in own)
        row = [study.arms[arm].title, str(len(own)), f'{score:.2f}', *cells, correlations]
        lines.append(f'| {" | ".join(row)} |')
    return '\n'.join(lines)


def add_results_args(parser: argparse.ArgumentParser, part: str) -> None:
    """Flags that `publish` reads."""
    parser.add_argument('--results', type=Path, help="the study's JSON file, which keeps these figures too")
    parser.add_argument('--write', type=Path, help=f'Markdown file with the markers <!-- study STEM {part} -->')


def publish(args: argparse.Namespace, part: str, rows: list[dict[str, Any]], table: str) -> None:
    """Prints a table; keeps its rows in the study's JSON file and puts it into a page, where these are named."""
    print(table)
    if args.results:
        kept = json.loads(args.results.read_text(encoding='utf-8')) if args.results.exists() else {}
        write_text(args.results, json.dumps({**kept, part: rows}, indent=1) + '\n')
    if args.write:
        marker = f'study {args.study.stem} {part}'
        write_between(args.write, f'<!-- {marker} -->', f'<!-- /{marker} -->', table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.study.stacked.probes', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder of the study, with its weights')
    parser.add_argument('--data-dir', type=Path)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--only', default='*', metavar='PATTERN', help='arms; those without context pools are left out')
    add_results_args(parser, 'probes')
    args = parser.parse_args(argv)
    study, device = read_study(args.study), torch.device(args.device)
    data = Data(args.output, args.data_dir, device)
    rows = []
    for name, arm in study.arms.items():
        for seed in arm.seeds if fnmatch.fnmatch(name, args.only) else ():
            if not result_file(args.output, run_name(name, seed)).exists():
                continue
            net = load_net(study, args.output, arm, seed, device)
            if pools_of(net):
                recipe = recipe_of(study, arm)
                row = probe(net, recipe, data.split(recipe, 'selection'))
                rows.append({'arm': name, 'seed': seed, **row, 'machine': machine()})
    if not rows:
        print('no finished run has a context pool')
        return 1
    publish(args, 'probes', rows, format_probes(study, rows))
    return 0


if __name__ == '__main__':
    sys.exit(main())
