"""What retrofitting buys: fine-tuning real ImageNet weights on few photographs, with and without pools.

    python -m benchmarks.real_weights -o output/real
    python -m benchmarks.finetune --data-dir CIFAR10 -o output/finetune [--write docs/real_weights.md]

`CIFAR10` holds `train/CLASS/*` and `validation/CLASS/*`. Every arm fine-tunes EfficientNet-Lite0 with the same images,
recipe and seeds; the arms differ in what stands behind the stages whose maps are at least 8 times coarser than the
image. All start from the same features. What is new there learns at five times the learning rate of the base, or, in
`depthwise7_slow`, at the same. Scored at the last epoch. Runs that have a result are not repeated: stop the command and
call it again. `--save` keeps the nets with pools of the runs that are made, for `cpool-inspect
local-dir:FOLDER/ARM-sSEED`.
"""
import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cpool_vision.layers import create_mixer
from cpool_vision.profile.measure import machine
from cpool_vision.retrofit import add_context_pool, context_pools, param_groups, save_model

from .markers import write_between
from .study.report import format_table, summarize
from .study.runner import write_text
from .study.spec import Arm, Study

BEGIN, END = '<!-- finetune -->', '<!-- /finetune -->'
POOL = {'positions': 'post_stage', 'groups': 8, 'ratio': 0.25}
# arm: arguments of add_context_pool, what stands in the pools' places, learning rate over that of the base
ARMS: dict[str, tuple[dict[str, Any] | None, str, float]] = {
    'plain': (None, '', 1.),
    'pool': (POOL, 'context', 5.),
    'depthwise7': (POOL, 'depthwise7', 5.),
    'depthwise7_slow': (POOL, 'depthwise7', 1.),
    'pool_one_group': ({'positions': 'post_stage', 'groups': 1, 'ratio': 0.1}, 'context', 5.),
}
CLASSES = 10


def load_images(folder: Path, per_class: int, px: int) -> tuple[Tensor, Tensor]:
    """The first images of every class by name: uint8 `(N, 3, px, px)`, and labels."""
    images, labels = [], []
    for label, directory in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for file in sorted(directory.iterdir())[:per_class]:
            with Image.open(file) as image:
                resized = image.convert('RGB').resize((px, px), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise FileNotFoundError(f'{folder} holds no class folders with images: name a folder laid out as CLASS/IMAGE')
    return torch.stack(images), torch.tensor(labels)


def make_model(arm: str, weights: Path, px: int) -> Any:
    """A fresh model of an arm, which predicts as the base does but for its new classifier."""
    where, mixer, _ = ARMS[arm]
    model: Any = timm.create_model(f'local-dir:{weights}', pretrained=True, num_classes=CLASSES)
    if where is not None:
        add_context_pool(model, img_size=px, **where)
        for name, pool in context_pools(model).items() if mixer != 'context' else ():
            # a convolution that starts as the identity needs no gate
            control = create_mixer(pool.dim, mixer=mixer)
            model.get_submodule(name.rpartition('.')[0]).add_module('cpool', control)
    return model.to(memory_format=torch.channels_last)


def normalize(images: Tensor) -> Tensor:
    return ((images.float() / 255 - .5) / .5).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A crop shifted by up to an eighth of the side, and a flip, for each image."""
    px = images.shape[-1]
    pad = px // 8
    padded = F.pad(images.float(), (pad,) * 4, mode='reflect')
    crops = []
    for image in padded:
        y, x, flip = torch.randint(2 * pad + 1, (3,), generator=generator).tolist()
        crop = image[:, y:y + px, x:x + px]
        crops.append(crop.flip(-1) if flip % 2 else crop)
    return torch.stack(crops)


def train(model: Any, arm: str, images: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> None:
    pooled = ARMS[arm][0] is not None
    parameters: Any = param_groups(model, ARMS[arm][2], lr=args.lr, weight_decay=.05) if pooled else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=.05)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group['lr'] for group in optimizer.param_groups], total_steps=steps, pct_start=.2)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[:len(order) // args.batch * args.batch].split(args.batch):
            loss = F.cross_entropy(
                model(normalize(augment(images[batch], generator))), labels[batch], label_smoothing=.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def top1(model: Any, images: Tensor, labels: Tensor, batch: int) -> float:
    model.eval()
    hits = sum(int((model(normalize(x)).argmax(1) == y).sum())
               for x, y in zip(images.split(batch), labels.split(batch), strict=True))
    return 100 * hits / len(labels)


def count_macs(model: Any, px: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, px, px))
    return counter.get_total_flops() // 2


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.finetune', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data-dir', type=Path, help='holds train/CLASS/* and validation/CLASS/*; without it nothing is run')
    add('--weights', type=Path, default=Path('output/real/tf_efficientnet_lite0'), help='folder of real_weights')
    add('-o', '--output', type=Path, required=True, help='folder of the results, one file per run')
    add('--px', type=int, default=64)
    add('--train', type=int, default=100, help='training images per class')
    add('--validation', type=int, default=100, help='validation images per class')
    add('--epochs', type=int, default=6)
    add('--batch', type=int, default=32)
    add('--lr', type=float, default=2e-3)
    add('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add('--arms', nargs='+', choices=ARMS, default=list(ARMS))
    add('--save', type=Path, metavar='FOLDER', help='keep the nets of these runs that have pools')
    add('--results', type=Path, help='copies all figures to this JSON file, or reads them where nothing is run')
    add('--write', type=Path, help=f'Markdown file with the markers {BEGIN} and {END}')
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ('px', 'train', 'validation', 'epochs', 'batch', 'lr')}
    rows = []
    if args.data_dir:
        data = {split: load_images(args.data_dir / split, getattr(args, split), args.px)
                for split in ('train', 'validation')}
        for seed in args.seeds:
            for arm in args.arms:
                file = args.output / f'{arm}-s{seed}.json'
                if not file.exists():
                    start = time.monotonic()
                    torch.manual_seed(seed)
                    model = make_model(arm, args.weights, args.px)
                    train(model, arm, *data['train'], args, seed)
                    row = dict(
                        settings, arm=arm, seed=seed, top1=top1(model, *data['validation'], args.batch),
                        params=sum(p.numel() for p in model.parameters()), macs=count_macs(model, args.px),
                        seconds=round(time.monotonic() - start), machine=machine())
                    if args.save and ARMS[arm][1] == 'context':
                        save_model(model, str(args.save / f'{arm}-s{seed}'), force=True, data_config=dict(
                            input_size=(3, args.px, args.px), mean=(.5,) * 3, std=(.5,) * 3, crop_pct=1.))
                    write_text(file, json.dumps(row, indent=1) + '\n')
                    print(f'{arm}, seed {seed}: top-1 {row["top1"]:.2f} %', flush=True)
                rows.append(json.loads(file.read_text(encoding='utf-8')))
                if {key: rows[-1][key] for key in settings} != settings:
                    raise SystemExit(f'{file} was made with other settings: name another output folder')
        if args.results:
            write_text(args.results, json.dumps(rows, indent=1) + '\n')
    elif args.results:
        rows = json.loads(args.results.read_text(encoding='utf-8'))
    if not rows:
        raise SystemExit('nothing to show: pass --data-dir, or --results with a file of figures')
    arms = {arm: Arm(arm, '', {}, {}, tuple(args.seeds), None if arm == 'plain' else 'plain') for arm in ARMS}
    table = format_table(summarize(Study('', arms, {}), rows, {}))
    print(f'\n{table}')
    if args.write:
        write_between(args.write, BEGIN, END, table)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
