"""How exact one training step's gradients are under autocast, of variants beside their bases.

    python -m benchmarks.autocast_gradients            # print
    python -m benchmarks.autocast_gradients --write    # between the markers in docs/performance.md

Each model makes one step (cross-entropy, batch of 16 random images, initial weights) in fp64, in fp32 and under bf16
autocast. Shown is the relative error of all gradients as one vector, `|g - g64| / |g64|`, over the parameters that base
and variant share. Seeded; on a processor.
"""
import pathlib
import sys
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import cpool_vision  # noqa: F401  registers the variants

from .markers import run_command

PAGE = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'performance.md'
MODELS = (
    'vit_micro_cpool_patch4_32', 'convnext_micro_cpool_32', 'resnet_micro_cpool_32',
    'swin_micro_cpool_patch2_window4_32', 'poolformer_micro_cpool_32')


def gradients(name: str, dtype: torch.dtype, autocast: bool, batch: int = 16, **kwargs: Any) -> dict[str, Tensor]:
    """Gradients of one training step, in fp64, by name of the parameter."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **kwargs).train().to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, *model.pretrained_cfg['input_size'], generator=generator).to(dtype)
    labels = torch.randint(0, model.num_classes, (batch,), generator=generator)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(images).to(torch.promote_types(dtype, torch.float32)), labels)
    loss.backward()
    return {key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None}


def error(name: str, dtype: torch.dtype, autocast: bool, **kwargs: Any) -> float:
    """Relative error of the gradients of the base's parameters, beside those in fp64."""
    exact, got = gradients(name, torch.float64, False, **kwargs), gradients(name, dtype, autocast, **kwargs)
    keys = [key for key in exact if 'cpool' not in key]
    distance = sum(float((got[key] - exact[key]).square().sum()) for key in keys)
    return (distance / sum(float(exact[key].square().sum()) for key in keys)) ** .5


def make_table(models: tuple[str, ...] = MODELS) -> str:
    """The table in Markdown."""
    lines = ['| model | fp32, base | fp32, variant | bf16 autocast, base | bf16 autocast, variant | ratio |',
             '|---|---:|---:|---:|---:|---:|']
    for name in models:
        figures = [error(name, torch.float32, autocast, **kwargs)
                   for autocast in (False, True) for kwargs in ({'cpool_positions': 'none'}, {})]
        lines.append(f'| `{name}` | {figures[0]:.1e} | {figures[1]:.1e} | {figures[2]:.1e} | {figures[3]:.1e} '
                     f'| {figures[3] / figures[2]:.2f} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    return run_command(argv, __doc__, PAGE, lambda: {'autocast-gradients': make_table()})


if __name__ == '__main__':
    sys.exit(main())
