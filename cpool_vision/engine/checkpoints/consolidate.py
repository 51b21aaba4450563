"""Folders of parts made into one ordinary file."""
import os
from typing import Any

import torch

from ..atomic import write_atomic
from ..errors import CheckpointError, ConfigError, OutputError
from .checkpoint import open_checkpoint, pick_weights
from .parts import Item, StoredTensor, make_whole, write_safetensors
from .seal import read_seal, save_sealed

_SUFFIXES = ('.pth.tar', '.pth', '.safetensors')


def _item(value: Any) -> Item:
    whole = value.whole if isinstance(value, StoredTensor) else lambda: value
    return Item(value.dtype, tuple(value.shape), whole)


def consolidate(path: str, output: str, use_ema: bool = False, force: bool = False) -> None:
    """Writes a checkpoint in parts as one file.

    Args:
        path: folder of parts; a file works too.
        output: `.pth.tar` or `.pth` for all of it, equal bit for bit to what `--checkpoint-format full` writes, which
            must fit into memory; `.safetensors` for the weights alone, of which one tensor at a time is in memory.
        use_ema: the averaged weights, for `.safetensors`.
        force: replace a file.

    Raises:
        ConfigError: another suffix, or `use_ema` without effect or average.
        CheckpointNotFoundError, CheckpointError: see `checkpoint.read_checkpoint`.
        OutputError: the file exists or cannot be written.
    """
    if not output.endswith(_SUFFIXES):
        raise ConfigError(f'--output {output!r}: the suffix must be one of {", ".join(_SUFFIXES)}')
    weights_only = output.endswith('.safetensors')
    if use_ema and not weights_only:
        raise ConfigError(f'--use-ema: {output!r} holds the average beside the weights anyway: drop it, or write '
                          '.safetensors')
    if os.path.lexists(output) and not force:
        raise OutputError(f'{output!r} exists: pass --force to replace it, or name another file')
    content = open_checkpoint(path, 'checkpoint')
    if not weights_only:
        seal = read_seal(path)
        save_sealed(output, make_whole(content), 0 if seal is None else seal.serial)
        return
    weights, is_ema = pick_weights(content, use_ema)
    if use_ema and not is_ema:
        raise ConfigError(f'--use-ema: {path!r} has no averaged weights: drop it')
    if not weights or not all(isinstance(value, (torch.Tensor, StoredTensor)) for value in weights.values()):
        raise CheckpointError(f'checkpoint {path!r} holds no model weights: expected a state dict')
    items = {name: _item(value) for name, value in weights.items()}
    write_atomic(output, lambda file: write_safetensors(file, items, {'format': 'pt'}))
