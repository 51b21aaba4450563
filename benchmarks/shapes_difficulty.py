"""How hard `cpool/shapes` is: validation accuracy of simple classifiers and of a small convolutional net.

    python -m benchmarks.shapes_difficulty

Chance is 10 %. The first three rows see pixels only: the set is no benchmark if they do well. The last learns from
scratch. One seed, CPU, flip and shift augmentation for the net.
"""
import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpool_vision.data import ShapesDataset


def _load(split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
    dataset = ShapesDataset(split, num_samples)
    images = torch.from_numpy(dataset.pixels()).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(), torch.from_numpy(dataset.targets())


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    return 100 * (logits.argmax(1) == targets).float().mean().item()


def nearest_neighbor(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Top-1 accuracy in per cent of the nearest training picture in Euclidean distance."""
    nearest = torch.cdist(val[0].flatten(1), train[0].flatten(1)).argmin(1)
    return 100 * (train[1][nearest] == val[1]).float().mean().item()


def color_histogram(images: Tensor, bins: int = 16) -> Tensor:
    """Shares of `bins` levels of each channel: `(N, 3 * bins)`."""
    level = ((images + 1) / 2 * bins).long().clamp(0, bins - 1)
    return torch.cat([F.one_hot(level[:, c].flatten(1), bins).float().mean(1) for c in range(3)], 1)


def _augment(images: Tensor) -> Tensor:
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    if torch.rand(()) < 0.5:
        images = images.flip(-2)
    top, left = torch.randint(0, 7, (2,)).tolist()
    return F.pad(images, (3, 3, 3, 3), mode='reflect')[..., top:top + images.shape[-2], left:left + images.shape[-1]]


def fit(
        model: nn.Module,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        epochs: int,
        lr: float,
        weight_decay: float,
        augment: bool = False,
) -> float:
    """Trains with AdamW and a one-cycle rate at batch 64; returns the last top-1 accuracy in per cent."""
    torch.manual_seed(0)
    steps = -(-len(train[0]) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train[0])).split(64):
            images = train[0][batch]
            loss = F.cross_entropy(model(_augment(images) if augment else images), train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return _accuracy(torch.cat([model(images) for images in val[0].split(500)]), val[1])


def small_convnet(width: int = 24) -> nn.Module:
    """Four convolutions, two of stride 2, global mean: 0.09 million parameters, 8 million MACs."""
    def unit(cin: int, cout: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]

    w = width
    layers = unit(3, w, 2) + unit(w, 2 * w) + unit(2 * w, 3 * w, 2) + unit(3 * w, 3 * w)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * w, 10))


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--num-samples', type=int, default=None, help='training samples (default: the whole split)')
    parser.add_argument('--epochs', type=int, default=12, help='epochs of the convolutional net')
    args = parser.parse_args()
    train, val = _load('train', args.num_samples), _load('validation', None)
    flat = (train[0].flatten(1), train[1]), (val[0].flatten(1), val[1])
    colors = (color_histogram(train[0]), train[1]), (color_histogram(val[0]), val[1])
    rows = {
        'linear classifier on pixels': lambda: fit(nn.Linear(3 * 32 * 32, 10), *flat, 10, 3e-4, 0.1),
        'two-layer perceptron on color histograms': lambda: fit(
            nn.Sequential(nn.Linear(48, 256), nn.ReLU(), nn.Linear(256, 10)), *colors, 10, 1e-2, 1e-4),
        'nearest neighbor': lambda: nearest_neighbor(train, val),
        f'small convolutional net, {args.epochs} epochs': lambda: fit(
            small_convnet(), train, val, args.epochs, 4e-3, 0.05, augment=True),
    }
    print(f'{len(train[0])} training and {len(val[0])} validation pictures\n')
    print('| classifier | top-1 (%) | CPU seconds |\n|---|---|---|')
    for name, run in rows.items():
        start = time.process_time()
        accuracy = run()
        print(f'| {name} | {accuracy:.1f} | {time.process_time() - start:.0f} |', flush=True)


if __name__ == '__main__':
    main()
