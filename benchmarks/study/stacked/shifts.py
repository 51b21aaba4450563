"""How nets do away from the sizes they were trained on: `python -m benchmarks.study.stacked.shifts FILE.yaml -o OUT`.

Scores finished runs of a dense task again, without training: on scenes whose objects are half and twice as large, and
on the same scenes drawn at half and twice the size. At another size the position embedding is resampled and supports
follow the grid; `supports kept` are as many tokens wide as in training.
"""
import argparse
import dataclasses
import fnmatch
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from cpool_vision.profile.measure import machine

from ..report import SCORES, contrast, difference_of, format_interval
from ..runner import run_name
from ..spec import Arm, Study, read_study
from .nets import build_net
from .probes import add_results_args, pools_of, publish
from .runs import Data, batch_of, recipe_of, weights_file
from .score import score_stack
from .tasks import Recipe, normalize


@dataclasses.dataclass(frozen=True)
class Shift:
    """Factors of the objects' radii and of the image's side, and whether supports keep their size in tokens."""
    objects: float = 1.0
    image: float = 1.0
    keep_supports: bool = False

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe whose scenes are shifted."""
        return dataclasses.replace(
            recipe, image_size=round(self.image * recipe.image_size), mean_radius=self.objects * recipe.mean_radius)


SHIFTS = {
    'as trained': Shift(),
    'objects half as large': Shift(objects=0.5),
    'objects twice as large': Shift(objects=2.0),
    'images at half the size': Shift(image=0.5),
    'images at half the size, supports kept': Shift(image=0.5, keep_supports=True),
    'images at twice the size': Shift(image=2.0),
    'images at twice the size, supports kept': Shift(image=2.0, keep_supports=True),
}


def shifted_net(arm: Arm, recipe: Recipe, shift: Shift, state: dict[str, Any]) -> nn.Module:
    """The net with the weights `state` for the images of a shift."""
    net = build_net(arm, shift.of(recipe), 0)
    name = 'body.pos_embed'
    side = round(net.state_dict()[name].shape[1] ** .5)
    state = dict(state, **{name: resample_abs_pos_embed(state[name], [side, side], num_prefix_tokens=0)})
    net.load_state_dict(state)
    for pool in pools_of(net) if shift.keep_supports else ():
        pool.ratio /= shift.image
    return net.eval()


def format_shifts(study: Study, rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Markdown: the scores of every arm by shift, and the differences that the study names, paired by seed."""
    arms = list(dict.fromkeys(row['arm'] for row in rows))
    pairs = [pair for pair in study.contrasts if set(pair) <= set(arms)]
    heads = [study.arms[a].title for a in arms] + [difference_of(study, *pair) for pair in pairs]
    lines = [f'| {SCORES[metric]} | ' + ' | '.join(heads) + ' |', '|---|' + '---:|' * len(arms) + '---|' * len(pairs)]
    for shift in dict.fromkeys(row['shift'] for row in rows):
        here = [row for row in rows if row['shift'] == shift]
        cells = []
        for arm in arms:
            own = [row[metric] for row in here if row['arm'] == arm]
            cells.append(f'{statistics.mean(own):.1f}' if own else '-')
        for pair in pairs:
            interval = contrast(here, *pair, metric)[1]
            cells.append(format_interval(*interval) if interval else '-')
        lines.append(f'| {shift} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.study.stacked.shifts', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder of the study, with its weights')
    parser.add_argument('--only', default='*', metavar='PATTERN', help='arms to score')
    add_results_args(parser, 'shifts')
    args = parser.parse_args(argv)
    study, device = read_study(args.study), torch.device('cpu')
    data = Data(args.output, None, device)
    rows = []
    for name, shift in SHIFTS.items():
        for arm, seed in study.runs():
            file = weights_file(args.output, run_name(arm.name, seed))
            if not fnmatch.fnmatch(arm.name, args.only) or not file.exists():
                continue
            recipe = recipe_of(study, arm)
            if not recipe.dense:
                raise SystemExit(f'{args.study} has no objects of known sizes: take a study of shapes-seg')
            net = shifted_net(arm, recipe, shift, load_file(file))
            if shift.keep_supports and not pools_of(net):
                continue
            score, = score_stack(
                lambda x, net=net: net(normalize(x))[None], 1, shift.of(recipe),  # type: ignore[misc]
                data.split(shift.of(recipe), 'selection'), batch_of(device))
            rows.append({'arm': arm.name, 'seed': seed, 'shift': name, recipe.metric: score[recipe.metric],
                         'machine': machine()})
    if not rows:
        print('no finished run has weights here')
        return 1
    publish(args, 'shifts', rows, format_shifts(study, rows, recipe.metric))
    return 0


if __name__ == '__main__':
    sys.exit(main())
