"""Implementations to compare: every backend of the operator, attention, and a depthwise convolution."""
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cpool_vision.ops import BACKENDS, available_backends, context_pool2d

from .cases import Case, Inputs

Function = Callable[[Tensor, Tensor, Tensor], Tensor]

REFERENCE = 'reference'
CONVOLUTION = 'depthwise_7x7'
BASELINES = ('sdpa_augmented', CONVOLUTION)
NAMES = (REFERENCE, *(name for name in BACKENDS if name != REFERENCE), *BASELINES)

# Matrices of all pairs that the dense reference holds at once, without and with gradients.
_PAIR_MATRICES = {False: 3, True: 6}
_USABLE_MEMORY = 0.8


def sdpa_augmented(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1) -> Tensor:
    """Computes the operator as attention with keys `(p_j, |p_j|^2, l_j)`.

    Runs in fp32 at least, because the norms cancel; even so it is less accurate than distances of integer indices.
    Arguments and result are those of `context_pool2d`.
    """
    b, c, h, w = x.shape
    g, ho, wo = sigma.shape[1:]
    dtype = torch.promote_types(x.dtype, torch.float32)

    def positions(height: int, width: int, step: int) -> Tensor:
        rows, cols = (
            step * torch.arange(out, dtype=dtype, device=x.device) + (step - 1) / 2 - (size - 1) / 2
            for out, size in ((height, h), (width, w)))
        grid = torch.stack(torch.meshgrid(rows, cols, indexing='ij'), -1)
        return grid.view(1, 1, height * width, 2).expand(b, g, -1, -1)

    keys, queries = positions(h, w, 1), positions(ho, wo, stride)
    inverse = sigma.to(dtype).flatten(2).unsqueeze(-1).square().reciprocal()
    query = torch.cat([queries * inverse, -inverse / 2, torch.ones_like(inverse)], -1)
    norms = keys.square().sum(-1, keepdim=True)
    key = torch.cat([keys, norms, weight_logits.to(dtype).flatten(2).unsqueeze(-1)], -1)
    value = x.to(dtype).reshape(b, g, c // g, h * w).transpose(2, 3)
    out = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return out.transpose(2, 3).reshape(b, c, ho, wo).to(x.dtype)


def implementations(case: Case) -> dict[str, Function]:
    """Returns every implementation by name, backends first, as functions of `(x, weight_logits, sigma)`."""
    channels, stride = case.shape[1], case.stride
    kernel = torch.randn(channels, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    kernel = kernel.to(case.device, case.torch_dtype).requires_grad_(case.backward)

    def backend(name: str) -> Function:
        return lambda x, logits, sigma: context_pool2d(x, logits, sigma, stride=stride, backend=name)

    functions: dict[str, Function] = {name: backend(name) for name in NAMES if name not in BASELINES}
    functions['sdpa_augmented'] = lambda x, logits, sigma: sdpa_augmented(x, logits, sigma, stride)
    functions[CONVOLUTION] = lambda x, logits, sigma: F.conv2d(
        x, kernel, stride=stride, padding=3, groups=channels)
    return functions


def free_memory(device: str) -> int | None:
    """Returns the number of bytes that can still be allocated, or None if unknown."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path('/proc/meminfo').read_text(encoding='ascii').splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return None


def _too_large(case: Case) -> str | None:
    """Returns why all pairs of the call do not fit in memory, estimated from its shape; None if they do."""
    b, _, h, w = case.shape
    ho, wo = case.out_size
    size = 8 if case.torch_dtype == torch.float64 else 4
    needed = b * case.groups * h * w * ho * wo * size * _PAIR_MATRICES[case.backward]
    free = free_memory(case.device)
    if free is None or needed <= _USABLE_MEMORY * free:
        return None
    return f'all pairs take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free'


def refusals(case: Case, inputs: Inputs) -> dict[str, str | None]:
    """Reports for each implementation whether it can run the case.

    Returns:
        The reason by name, or None if it can run.
    """
    x, logits, sigma = (t.detach().requires_grad_(case.backward) for t in inputs)
    reasons = available_backends(x, logits, sigma, case.stride)
    reasons = {name: reasons.get(name) for name in NAMES}
    reasons[REFERENCE] = reasons[REFERENCE] or _too_large(case)
    if x.device.type == 'cpu':
        # On CUDA the memory-efficient kernel takes keys and values of different widths.
        reasons['sdpa_augmented'] = _too_large(case)
    return reasons
