"""How often the loops of the kernels run, from the rule by which they read: mean trips over sampled supports."""
import math
from typing import Any

import torch

from cpool_vision.ops import TOLERANCE

from .launches import Call, Launch

_OUTSIDE = -1e6


class Windows:
    """Radii of sampled planes: supports uniform in [0.1, sigma], normal logits, stride 1."""

    def __init__(self, call: Call, planes: int = 48):
        gen = torch.Generator().manual_seed(0)
        self.h, self.w = call.h, call.w
        logits = torch.randn(planes, call.h, call.w, generator=gen)
        sigma = 0.1 + (call.sigma - 0.1) * torch.rand(planes, call.h, call.w, generator=gen)
        log = torch.log(4 * (1 + 0.2 * sigma) * (1 + 2.5066283 * sigma)) - 3 * sigma.clamp(max=1).log()
        log = log + logits.amax((1, 2), True) - logits - math.log(TOLERANCE[call.dtype])
        self.radius = (2 * sigma.square() * log).sqrt()

    def trips(self, launch: Launch) -> list[float]:
        """Mean trips of a kernel's loops, the outermost first."""
        a = launch.args
        if launch.name == 'prepare':
            return [1.0]
        blocks = 1 if a.get('TAIL') else -(-a['CHANNELS'] // a['BLOCK_C'])
        if launch.name == 'grad_keys':
            return self._chunks_of_queries(a)
        outer = self._chunks_of_keys(a)
        return [*outer, float(blocks)] if launch.name == 'grad_queries' and blocks > 1 else outer

    def _pieces(self, block: int) -> torch.Tensor:
        """Largest radius `(planes, rows, blocks)` of a row of a block of columns."""
        pad = -self.w % block
        return torch.nn.functional.pad(self.radius, (0, pad), value=_OUTSIDE).unflatten(2, (-1, block)).amax(3)

    def _starts(self, a: dict[str, Any]) -> list[tuple[int, int]]:
        columns = a['X_BLOCKS'] * a['XW']
        return [(y, x) for y in range(0, self.h, a['TILE_H']) for x in range(0, columns, a['TILE_W'])]

    def _chunks_of_keys(self, a: dict[str, Any]) -> list[float]:
        if a['WHOLE']:
            return [float(a['X_BLOCKS']), float(math.ceil(self.h / a['CHUNK']))]
        width, blocks, chunks = a['XW'], 0.0, 0.0
        r, starts = self._pieces(width), self._starts(a)
        for y0, x0 in starts:
            rows = torch.arange(y0, min(y0 + a['TILE_H'], self.h))[None, :, None]
            part = slice(x0 // width, x0 // width + max(1, a['TILE_W'] // width))
            top = r[:, rows.flatten(), part]
            first = torch.arange(top.shape[2]) * width + (x0 if a['TILE_W'] < width else x0 // width * width)
            last = first + min(width, a['TILE_W']) - 1
            inside = top >= 0
            ya = torch.where(inside, rows - top, 1e6).amin((1, 2)).clamp(0, self.h).int() // a['CHUNK'] * a['CHUNK']
            yb = (rows + top).amax((1, 2)).clamp(-1, self.h - 1).int() + 1
            xa = torch.where(inside, first - top, 1e6).amin((1, 2)).clamp(0, self.w).int() // width
            xb = (last + top).amax((1, 2)).clamp(-width, self.w - 1).int() // width + 1
            n = (xb - xa).clamp(min=0).double()
            blocks += float(n.mean())
            chunks += float((n * (-(-(yb - ya) // a['CHUNK'])).clamp(min=0)).mean())
        return [blocks / len(starts), chunks / max(blocks, 1e-9)]

    def _chunks_of_queries(self, a: dict[str, Any]) -> list[float]:
        blocks = a['Q_BLOCKS']
        if a['WHOLE']:
            return [float(blocks), float(math.ceil(self.h / a['CHUNK']))]
        width, total, starts, row = a['XW'], 0.0, self._starts(a), torch.arange(self.h)
        r = self._pieces(width)
        for y0, x0 in starts:
            for b in range(blocks):
                gap = max(b * width - (x0 + a['TILE_W'] - 1), x0 - (b * width + width - 1), 0)
                top = r[:, :, b]
                reaches = (row + top >= y0) & (row - top <= y0 + a['TILE_H'] - 1) & (gap <= top)
                first = torch.where(reaches, row, 1 << 20).amin(1) // a['CHUNK'] * a['CHUNK']
                last = torch.where(reaches, row, -1).amax(1) + 1
                total += float((-(-(last - first) // a['CHUNK'])).clamp(min=0).double().mean())
        return [float(blocks), total / len(starts) / blocks]
