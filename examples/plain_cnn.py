"""A pool in a plain PyTorch network: `python examples/plain_cnn.py`.

Shows how to use the layer and how to read what it has learned: trains a small network on generated images, and prints
its accuracy, supports and gate. This is not a comparison: in such a small network and run, the effect of a pool is
within the noise of the seed. docs/evidence.md compares with controls and several seeds.
"""
import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from cpool_vision import ContextPool2d
from cpool_vision.data import ShapesDataset
from cpool_vision.inspect import context_maps


def make_net() -> nn.Sequential:
    """Three convolutions with a pool before the last one, and a linear layer: about 60,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        ContextPool2d(64, ratio=.25, init='identity'),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--epochs', type=int, default=4)
    args = parser.parse_args()

    def to_tensor(image):
        return pil_to_tensor(image).float() / 127.5 - 1

    train = DataLoader(ShapesDataset('train', args.images, transform=to_tensor), 64, shuffle=True, drop_last=True)
    test = DataLoader(ShapesDataset('validation', 1000, transform=to_tensor), 200)
    torch.manual_seed(0)
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, args.epochs * len(train))
    for _ in range(args.epochs):
        for images, targets in train:
            loss = F.cross_entropy(net(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        right = sum((net(images).argmax(1) == targets).sum().item() for images, targets in test)
    print(f'{right / 10:.1f} % of 1,000 new images are right')
    for name, maps in context_maps(net, next(iter(test))[0]).items():
        low, high = maps.sigma.quantile(torch.tensor([.05, .95])).tolist()
        print(f'layer {name}: 90 % of the supports lie between {low:.2f} and {high:.2f} pixels, '
              f'mean gate {maps.gate:.2f}')


if __name__ == '__main__':
    main()
