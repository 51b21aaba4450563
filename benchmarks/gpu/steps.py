"""Training steps of the variants, of their bases, and of a depthwise 7x7 convolution in the same slot."""
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F

import cpool_vision  # noqa: F401  registers the variants

from .timing import call_ms, kernels_ms

# Model, batch, and the ratio of the eager step's time to the base's that is aimed at.
MODELS = (
    ('vit_small_cpool_patch16_224', 256, 1.15),
    ('convnext_tiny_cpool', 128, 1.12),
    ('resnet50_cpool', 128, 1.03),
    ('swin_tiny_cpool_patch4_window7_224', 128, 1.10),
    ('vit_base_cpool_patch16_224', 128, 1.12),
)
COMPILED_AIM = 1.08
TINY_MODELS = (('vit_micro_cpool_patch4_32', 2, 1.15),)
ARMS: dict[str, dict[str, Any]] = {
    'base': {'cpool_positions': []}, 'variant': {}, 'depthwise_7x7': {'cpool_mixer': 'depthwise7'}}


def make_step(name: str, arm: str, batch: int, device: str, compiled: bool) -> Callable[[], None]:
    """One step under bf16 autocast, channels-last, with AdamW, on a batch of noise."""
    torch.manual_seed(0)
    with torch.device(device):  # a fast device makes initial weights sooner
        model: Any = timm.create_model(name, **ARMS[arm]).train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=torch.device(device).type == 'cuda')
    images = torch.randn(batch, *model.pretrained_cfg['input_size'], device=device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(model.num_classes, (batch,), device=device)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = F.cross_entropy(run(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def warm_up(name: str, device: str) -> None:
    """Has the variant's kernels compiled into Triton's cache, for another process."""
    make_step(name, 'variant', 16, device, False)()


def measure(name: str, arm: str, batch: int, device: str, repeats: int, compiled: bool) -> dict[str, Any]:
    """Time of a step in ms and, in eager mode, of its kernels by name."""
    step = make_step(name, arm, batch, device, compiled)
    row: dict[str, Any] = {'arm': arm, 'batch': batch, 'step_ms': call_ms(step, device, repeats, warm_up=3)}
    if torch.device(device).type == 'cuda':
        row['peak_gib'] = torch.cuda.max_memory_allocated(device) / 2 ** 30
        torch.cuda.reset_peak_memory_stats(device)
    if not compiled and arm != 'depthwise_7x7':
        kernels = kernels_ms(step, device, 1)
        row['kernel_ms'] = sum(kernels.values())
        row['kernels_ms'] = dict(list(kernels.items())[:60])
    return row
