"""A pool in a plain PyTorch network: `python examples/plain_cnn.py`.

Trains two small networks, one with `ContextPool2d` before its last convolution and one without, on images that the
package makes itself, and prints what they score.
"""
import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from cpool_vision import ContextPool2d
from cpool_vision.data import ShapesDataset


def make_net(pooled: bool) -> nn.Sequential:
    """Three convolutions and a linear layer, about 60,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        ContextPool2d(64, ratio=.25, init='identity') if pooled else nn.Identity(),
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
    for pooled in (False, True):
        torch.manual_seed(0)
        net = make_net(pooled)
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
        print(f'{"with" if pooled else "without"} a context pool: {right / 10:.1f} % of 1,000 images')
        if pooled:
            pool = next(m for m in net if isinstance(m, ContextPool2d))
            with torch.no_grad():
                sigma = pool.maps(net[:6](images))[1]
            print(f'supports from {sigma.min():.2f} to {sigma.max():.2f} pixels, '
                  f'gate up to {pool.gamma.abs().max():.2f}')


if __name__ == '__main__':
    main()
