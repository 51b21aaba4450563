"""Table of every registered variant: input size, parameters and MACs beside those of its plain base.

    python -m benchmarks.model_table            # print
    python -m benchmarks.model_table --write    # between the markers in docs/models.md
    python -m benchmarks.model_table --check    # exit status 1 if that page holds another table

The base is the same architecture built with `cpool_positions=[]`. MACs are half the FLOPs that
`torch.utils.flop_counter.FlopCounterMode` counts at batch 1, with attention computed by plain products; the context
pool counts by the formula registered for its operator. Models are built on the meta device: nothing is computed.
"""
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch.utils.flop_counter import FlopCounterMode

import cpool_vision

from .markers import run_command

MARKER = 'model-table'
PAGE = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'models.md'


@dataclass(frozen=True)
class Row:
    """Figures of one variant; parameters and MACs are plain counts."""
    name: str
    size: int
    base_params: int
    params: int
    base_macs: int
    macs: int


def count(name: str, **kwargs: Any) -> tuple[int, int, int]:
    """Input side in pixels, parameters and MACs (batch 1) of a model."""
    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        with torch.device('meta'):
            model: Any = timm.create_model(name, **kwargs).eval()
    finally:
        set_fused_attn(bool(fused))
    with torch.device('meta'):
        channels, height, width = model.pretrained_cfg['input_size']
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, channels, height, width))
    return height, sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def measure(name: str) -> Row:
    """Figures of a variant and of its base."""
    size, params, macs = count(name)
    _, base_params, base_macs = count(name, cpool_positions=[])
    return Row(name, size, base_params, params, base_macs, macs)


def format_table(rows: list[Row]) -> str:
    """Markdown table of the rows."""
    def change(new: int, old: int) -> str:
        return f'{100 * (new - old) / old:+.1f} %'

    lines = [
        '| model | input | parameters (M) | base (M) | difference | MACs (G) | base (G) | difference |',
        '|---|---|---|---|---|---|---|---|',
    ]
    lines += [
        f'| `{row.name}` | {row.size} | {row.params / 1e6:.2f} | {row.base_params / 1e6:.2f} | '
        f'{change(row.params, row.base_params)} | {row.macs / 1e9:.3f} | {row.base_macs / 1e9:.3f} | '
        f'{change(row.macs, row.base_macs)} |'
        for row in rows
    ]
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints, writes or checks the table; returns the exit status."""
    return run_command(argv, __doc__, PAGE, lambda: {
        MARKER: format_table([measure(name) for name in cpool_vision.list_models()])})


if __name__ == '__main__':
    sys.exit(main())
