"""Schemas, fakes and autograd of the operators under `torch.ops.cpool_vision`."""
from typing import Optional

import torch
from torch import Tensor

from .reference import context_pool2d_reference

_lib = torch.library.Library('cpool_vision', 'DEF')

_lib.define('context_pool2d(Tensor x, Tensor weight_logits, Tensor sigma, int stride=1, str? backend=None) -> Tensor')
_lib.define('support_size(Tensor raw, int height, int width, float ratio, float floor) -> Tensor')


def _context_pool2d(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1, backend: Optional[str] = None) -> Tensor:
    return context_pool2d_reference(x, weight_logits, sigma, stride)


def _support_size(raw: Tensor, height: int, width: int, ratio: float, floor: float) -> Tensor:
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return floor + ratio * (height * width) ** 0.5 * raw.sigmoid()


_lib.impl('context_pool2d', _context_pool2d, 'CompositeImplicitAutograd')
_lib.impl('support_size', _support_size, 'CompositeImplicitAutograd')
