"""A U-Net on a pooled encoder: `python examples/segmentation_unet.py`.

The encoder is `resnet18_cpool` with timm's `features_only`; images are generated discs on noise.
"""
import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpool_vision  # noqa: F401  registers the variants


class UNet(nn.Module):
    """Upsamples and joins the encoder's maps from the coarsest to the finest."""

    def __init__(self, encoder: str, width: int = 32) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, features_only=True)
        channels = self.encoder.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in channels)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [lateral(m) for lateral, m in zip(self.lateral, self.encoder(x), strict=True)]
        y = self.smooth[-1](maps[-1])
        for smooth, m in zip(self.smooth[-2::-1], maps[-2::-1], strict=True):
            y = smooth(m + F.interpolate(y, m.shape[-2:], mode='bilinear'))
        return F.interpolate(self.head(y), x.shape[-2:], mode='bilinear')


def discs(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `(count, 3, size, size)` of a brighter disc on noise, and its masks `(count, 1, size, size)`."""
    center = size * (.25 + .5 * torch.rand(count, 2, 1, 1, generator=generator))
    radius = size * (.08 + .2 * torch.rand(count, 1, 1, generator=generator))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    mask = ((y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2 < radius ** 2).float()[:, None]
    return torch.randn(count, 3, size, size, generator=generator) + .7 * mask, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--encoder', default='resnet18_cpool')
    parser.add_argument('--steps', type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = UNet(args.encoder)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for step in range(args.steps):
        images, masks = discs(8, 64, generator)
        loss = F.binary_cross_entropy_with_logits(net(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f'step {step + 1}: loss {loss.item():.3f}')
    net.eval()
    images, masks = discs(32, 64, generator)
    with torch.no_grad():
        found = net(images) > 0
    shared, either = (found & (masks > 0)).sum(), (found | (masks > 0)).sum()
    print(f'intersection over union on new images: {shared / either:.2f}')


if __name__ == '__main__':
    main()
