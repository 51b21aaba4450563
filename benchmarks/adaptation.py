"""A task where the size of things counts: `python -m benchmarks.adaptation`. What `make demo` shows.

A small network fills every object of an image with the object's mean color and leaves the background unchanged. Objects
differ in size by a factor of up to eight. Dilated convolutions see the surroundings; the mixer under test then moves
colors, and a 1x1 convolution reads the moved colors alone. So the convolutions can tell the mixer where to look, but
cannot fill objects themselves. A context pool can compute the mean over an object if its weights leave out the
background and its supports follow the object's size: the task is designed for it.

By default, one network with predicted supports is trained and drawn. `--study OUT` trains every arm with six seeds, one
run after the other, and writes one file per run, so that it can be stopped and called again.
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cpool_vision.data.shapes_seg import ShapesSegDataset
from cpool_vision.inspect.canvas import STYLE, Sheet, require_matplotlib, save_figure, show
from cpool_vision.layers import ContextPool2d
from cpool_vision.layers.factory import create_mixer
from cpool_vision.profile.measure import machine

from .markers import write_between
from .study.report import format_interval, paired_interval
from .study.runner import write_text

SIZE, RANGE, OBJECTS = 32, 8.0, 3
TRAIN, SELECTION, BATCH, STEPS, RATE = 1500, 200, 16, 400, 4e-3
GROUND_WEIGHT = 0.2
ARMS = {
    'predicted supports': 'context',
    'one learned support': 'layer',
}
SEEDS = range(6)


class Pictures(NamedTuple):
    """Pictures and what to paint, `(N, 3, H, W)` between -1 and 1; radius of the object of a pixel, `(N, H, W)`."""
    images: Tensor
    painted: Tensor
    radii: Tensor


def objects_of(masks: Tensor, radii: Tensor) -> list[Tensor]:
    """Boolean `(H, W)` of every object of a picture; objects of one class and one radius count as one."""
    kinds = masks.double() * 4096 + radii.double()
    return [kinds == kind for kind in kinds.unique() if kind > 0]


def make_pictures(split: str, samples: int) -> Pictures:
    """Pictures of `cpool/shapes-seg` with every object's mean color."""
    crowd = ShapesSegDataset(split, samples, SIZE, size_range=RANGE, objects=OBJECTS).arrays()
    images = torch.from_numpy(crowd.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    painted = images.clone()
    masks, radii = torch.from_numpy(crowd.masks), torch.from_numpy(crowd.radii)
    for picture, source, mask, radius in zip(painted, images, masks, radii, strict=True):
        for place in objects_of(mask, radius):
            picture[:, place] = source[:, place].mean(1, keepdim=True)
    return Pictures(images, painted, radii)


class Painter(nn.Module):
    """Dilated convolutions, the mixer under test over colors and features, and a 1x1 convolution of mixed colors."""

    def __init__(self, mixer: str, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, dilation in enumerate((1, 2, 4, 8, 1)):
            layers += [nn.Conv2d(width if i else 3, width, 3, padding=dilation, dilation=dilation), nn.GELU()]
        self.features = nn.Sequential(*layers)
        self.mixer = create_mixer(width + 3, mixer=mixer, ratio=0.25, support_init=0.1)
        self.head = nn.Conv2d(3, 3, 1)
        with torch.no_grad():  # starts by painting what the mixer makes of the colors
            self.head.weight.copy_(torch.eye(3)[..., None, None])
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def mixed_maps(self, images: Tensor) -> Tensor:
        """What the mixer reads, `(B, 3 + width, H, W)`."""
        return torch.cat([images, self.features(images)], 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mixer(self.mixed_maps(images))[:, :3])


def train(mixer: str, seed: int, pictures: Pictures) -> Painter:
    """A net trained by AdamW with a one-cycle learning rate; the same pictures in the same order for every mixer."""
    torch.manual_seed(seed)
    features = Painter('identity').state_dict()  # shared by all mixers
    net = Painter(mixer)
    net.load_state_dict({k: features.get(k, v) for k, v in net.state_dict().items()})
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        index = torch.randint(len(pictures.images), (BATCH,), generator=draws)
        images, painted, radii = (t[index] for t in pictures)
        if torch.rand((), generator=draws) < 0.5:
            images, painted, radii = (t.flip(-1) for t in (images, painted, radii))
        weights = torch.where(radii > 0, 1., GROUND_WEIGHT)[:, None]
        loss = ((net(images) - painted).square() * weights).sum() / (3 * weights.sum())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        schedule.step()
    return net.eval()


def predicted_maps(net: Painter, images: Tensor) -> tuple[Tensor, Tensor]:
    """Weight logits and supports in pixels of the net's pool, both `(B, H, W)`.

    Raises:
        TypeError: its mixer is no context pool.
    """
    if not isinstance(net.mixer, ContextPool2d):
        raise TypeError(f'a context pool has supports, and {net.mixer.mixer!r} is none')
    with torch.no_grad():
        logits, sigma = net.mixer.predict_maps(net.mixed_maps(images))
    return logits.mean(1), sigma.mean(1)


def score(net: Painter, pictures: Pictures) -> dict[str, float]:
    """Squared errors on objects and background, both in percent of the error on objects when nothing is painted, and
    what the supports have to do with the objects."""
    with torch.no_grad():
        outputs = torch.cat([net(images) for images in pictures.images.split(50)])
    inside = pictures.radii > 0
    errors, nothing = ((t - pictures.painted).square().mean(1) for t in (outputs, pictures.images))
    unit = nothing[inside].mean()
    row = {'objects': float(100 * errors[inside].mean() / unit), 'ground': float(100 * errors[~inside].mean() / unit)}
    if isinstance(net.mixer, ContextPool2d):
        logits, sigma = (torch.cat(t) for t in zip(
            *(predicted_maps(net, images) for images in pictures.images.split(50)), strict=True))
        row |= {'support_objects': float(sigma[inside].mean()), 'support_ground': float(sigma[~inside].mean()),
                'widest_logits': float((logits.flatten(1).amax(1) - logits.flatten(1).amin(1)).max())}
        means = torch.tensor([
            [float(s[r == radius].mean()), float(radius)]
            for s, r in zip(sigma, pictures.radii, strict=True) for radius in r.unique() if radius > 0])
        if sigma.amax() > sigma.amin():
            row['correlation'] = float(torch.corrcoef(means.T)[0, 1])
    return row


def draw(net: Painter, pictures: Pictures, rows: int, path: Path) -> None:
    """The first pictures, what the net paints, its supports and its weights."""
    matplotlib = require_matplotlib()
    images = pictures.images[:rows]
    logits, sigma = (t.numpy() for t in predicted_maps(net, images))
    with torch.no_grad():
        painted = net(images)
    shown, wanted, seen = ((t.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy()
                           for t in (painted, pictures.painted[:rows], images))
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(rows, 1, 1., per_layer=4)
        log2 = (logits - np.log(np.exp(logits).mean((1, 2), keepdims=True))) / np.log(2)
        reach = float(np.abs(log2).max())
        for row in range(rows):
            for column, picture in enumerate((seen, wanted, shown)):
                show(sheet.panel(row, column), picture[row], (SIZE, SIZE))
            supports = show(
                sheet.panel(row, 3), sigma[row], (SIZE, SIZE), vmin=0, vmax=float(sigma.max()), cmap='viridis')
            weights = show(sheet.panel(row, 4), log2[row], (SIZE, SIZE), vmin=-reach, vmax=reach, cmap='RdBu_r')
        for column, text in enumerate(('picture', 'to paint', 'painted', 'support', 'pooling weight')):
            sheet.heading(column, column + 1, text, 'normal')
        for column, values, label in ((3, supports, 'σ (px)'), (4, weights, 'log₂ (weight / uniform)')):
            sheet.figure.colorbar(values, cax=sheet.bar(column), orientation='horizontal', label=label,
                                  ticks=matplotlib.ticker.MaxNLocator(3))
    save_figure(sheet.figure, str(path), 160)


def run_study(output: Path) -> list[dict[str, Any]]:
    """Every arm with every seed that has no file yet; all arms of a seed before the next."""
    pictures, selection = make_pictures('train', TRAIN), make_pictures('validation', SELECTION)
    rows = []
    for seed in SEEDS:
        for arm, mixer in ARMS.items():
            file = output / f'{mixer}-s{seed}.json'
            if not file.exists():
                start = time.process_time()
                net = train(mixer, seed, pictures)
                params = sum(p.numel() for p in net.parameters())
                write_text(file, json.dumps({
                    'arm': arm, 'seed': seed, 'params': params, **score(net, selection),
                    'cpu_seconds': round(time.process_time() - start, 1), 'machine': machine()}, indent=1) + '\n')
            rows.append(json.loads(file.read_text(encoding='utf-8')))
            print(f'{arm}, seed {seed}: {rows[-1]["objects"]:.1f} % of the error on objects left', flush=True)
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: errors left, differences to the first arm paired by seed, and what the supports do."""
    lines = ['| supports | seeds | error on objects (%) | difference (95 %) | error on the background (%) '
             '| difference (95 %) | support on objects, on the background (px) | correlation with radius |',
             '|---|---:|---:|---|---:|---|---|---:|']
    by_arm = {arm: {row['seed']: row for row in rows if row['arm'] == arm} for arm in ARMS}
    first = next(iter(ARMS))
    for arm, own in by_arm.items():
        cells = []
        for key in ('objects', 'ground'):
            interval = paired_interval([row[key] - by_arm[first][seed][key] for seed, row in own.items()])
            cells += [f'{statistics.mean(row[key] for row in own.values()):.1f}',
                      '' if arm == first or interval is None else format_interval(*interval)]
        for keys in (('support_objects', 'support_ground'), ('correlation',)):
            means = [statistics.mean(row.get(key, float('nan')) for row in own.values()) for key in keys]
            cells.append(', '.join('-' if mean != mean else f'{mean:.2f}' for mean in means))
        lines.append(f'| {arm} | {len(own)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.adaptation', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, default=Path('adaptation.png'), help='picture to write')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rows', type=int, default=4, help='pictures to draw')
    parser.add_argument('--study', type=Path, metavar='OUT', help='train every arm with six seeds; results go here')
    parser.add_argument('--results', type=Path, help='JSON file for all figures of the study')
    parser.add_argument('--write', type=Path, help='Markdown file with the markers <!-- adaptation -->')
    args = parser.parse_args(argv)
    if args.study:
        rows = run_study(args.study)
        table = format_rows(rows)
        print(table)
        if args.results:
            write_text(args.results, json.dumps(rows, indent=1) + '\n')
        if args.write:
            write_between(args.write, '<!-- adaptation -->', '<!-- /adaptation -->', table)
        return 0
    start = time.monotonic()
    net = train('context', args.seed, make_pictures('train', TRAIN))
    selection = make_pictures('validation', SELECTION)
    row = score(net, selection)
    draw(net, selection, args.rows, args.output)
    print(f'trained in {time.monotonic() - start:.0f} s; of the error on objects {row["objects"]:.0f} % is left\n'
          f'mean support {row["support_objects"]:.2f} px on objects, {row["support_ground"]:.2f} px on the background; '
          f'correlation of an object\'s mean support with its radius {row["correlation"]:+.2f}\n'
          f'weight logits of a picture span {row["widest_logits"]:.1f} nats at most\n{args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
