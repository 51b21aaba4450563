"""A layer's forward and backward pass under bf16 autocast: the pool's kernels, and what stands around them."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cpool_vision.layers import ContextPool2d, TokenContextPool

from .timing import call_ms, kernels_ms

POOL_KERNELS = ('prepare', 'pool', 'grad_queries', 'grad_keys')
# By name: features `(B, N, C)` of tokens behind a prefix token or `(B, C, H, W)` of maps, and groups.
LAYERS: dict[str, tuple[tuple[int, ...], int]] = {
    'ViT-S tokens, 16 groups': ((256, 197, 384), 16),
    'ViT-B tokens, 16 groups': ((128, 197, 768), 16),
    'ViT-S tokens, 1 group': ((256, 197, 384), 1),
    'ConvNeXt-T 28x28, 16 groups': ((128, 192, 28, 28), 16),
    'ResNet-50 14x14, 1 group': ((128, 1024, 14, 14), 1),
}
TINY_LAYERS = {'tiny tokens': ((2, 17, 16), 2), 'tiny maps': ((2, 16, 5, 4), 1)}


def make_step(shape: tuple[int, ...], groups: int, device: str) -> Callable[[], None]:
    """Features come in fp32, as a norm returns them, and gradients in the dtype of the output."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    arguments: tuple[int, ...] = ()
    layer: nn.Module
    if len(shape) == 3:
        side = int((shape[1] - 1) ** 0.5)
        arguments = side, side
        layer = TokenContextPool(shape[2], num_prefix_tokens=1, groups=groups, ratio=0.25)
    else:
        x = x.to(memory_format=torch.channels_last)
        layer = ContextPool2d(shape[1], groups=groups)
    layer, x = layer.to(device), x.requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            y: Tensor = layer(x, *arguments)
        torch.autograd.backward(y, grad.to(y.dtype))
        layer.zero_grad()
        x.grad = None
    return step


def measure(name: str, shape: tuple[int, ...], groups: int, device: str, repeats: int) -> dict[str, Any]:
    """Times in ms: with launches, of all kernels, and of the longest; and whether the predictor was one operator."""
    step = make_step(shape, groups, device)
    kernels = kernels_ms(step, device)
    return {
        'layer': name, 'predictor': 'fused' if 'predict' in kernels else 'composed',
        'both_ms': call_ms(step, device, repeats, warm_up=3), 'kernel_ms': sum(kernels.values()),
        'pool_ms': sum(kernels.get(kernel, 0.0) for kernel in POOL_KERNELS),
        'kernels_ms': dict(list(kernels.items())[:12])}
