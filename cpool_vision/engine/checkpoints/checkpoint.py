"""Checkpoints: safe reading, exact fit. The format of files is timm's, holding plain types only."""
import argparse
import logging
import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from timm.models import clean_state_dict

from cpool_vision.errors import CheckpointError, CheckpointNotFoundError

from .seal import check_seal

_logger = logging.getLogger(__name__)


def read_checkpoint(path: str, flag: str) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without ever executing code from it.

    Args:
        path: a file of `torch.save` or `.safetensors`.
        flag: flag that named the file, for messages.

    Returns:
        Its dictionary.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointVersionError: written by a newer release.
        CheckpointError: damaged, not a checkpoint, or it contains objects other than tensors and plain values.
    """
    if os.path.isdir(path):
        raise CheckpointNotFoundError(f'{flag} {path!r} is a folder: name a checkpoint file in it')
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f'{flag} {path!r} is not a regular file: use a copy')
    if not os.path.isfile(path):
        raise CheckpointNotFoundError(f'{flag} {path!r} does not exist: check the path')
    try:
        if path.endswith('.safetensors'):
            content: Any = safetensors.torch.load_file(path)
        else:
            check_seal(path, flag)
            # timm's own training checkpoints hold their arguments as a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{flag} {path!r} was refused: it holds objects other than tensors and plain values, or is not a '
            'checkpoint; ask its author for a safetensors file') from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise CheckpointError(f'{flag} {path!r} cannot be read, it is damaged or not a checkpoint ({reason}): '
                              'use another copy') from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{flag} {path!r} holds a {type(content).__name__}: expected a dictionary of weights')
    return dict(content)


def pick_weights(checkpoint: Mapping[str, Any], use_ema: bool) -> tuple[dict[str, torch.Tensor], bool]:
    """Weights of a checkpoint, without DDP and compile prefixes, and whether they are the averaged ones."""
    keys = (['state_dict_ema', 'model_ema'] if use_ema else []) + ['state_dict', 'model']
    for key in keys:
        if isinstance(checkpoint.get(key), Mapping):
            return clean_state_dict(checkpoint[key]), key.endswith('_ema')
    return clean_state_dict(dict(checkpoint)), False


def weights_of(content: Mapping[str, Any], path: str, flag: str, use_ema: bool) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint that is read already; the averaged ones if asked for and present.

    Raises:
        CheckpointError: it holds no tensors.
    """
    weights, is_ema = pick_weights(content, use_ema)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f'{flag} {path!r} holds no model weights: expected a state dict')
    _logger.info('Loaded %s weights from %s.', 'averaged' if is_ema else 'model', path)
    return weights


def describe_misfit(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    """What keeps `given` weights from loading into a model with `expected` ones; '' if they fit."""
    parts = []
    for title, names in (
        ('missing', [name for name in expected if name not in given]),
        ('unexpected', [name for name in given if name not in expected]),
        ('of another shape', [name for name, value in expected.items()
                              if name in given and given[name].shape != value.shape]),
    ):
        if names:
            name = names[-1] if title == 'of another shape' else names[0]
            detail = f', {tuple(given[name].shape)} for {tuple(expected[name].shape)}' if title.startswith('of') else ''
            parts.append(f'{len(names)} {title} (e.g. {name}{detail})')
    return '; '.join(parts)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: str, flag: str, name: str) -> None:
    """Loads weights that must fit exactly; the model is untouched if they do not.

    Raises:
        CheckpointError: another architecture or class count.
    """
    expected = model.state_dict()
    misfit = describe_misfit(expected, weights)
    if misfit:
        same_keys = set(expected) == set(weights)
        remedy = 'set --num-classes, --in-chans or the input size as in training' if same_keys \
            else 'name the --model (and --model-kwargs) that it was trained with'
        raise CheckpointError(f'{flag} {path!r} does not fit model {name!r}: {misfit}; {remedy}')
    model.load_state_dict(dict(weights), strict=True)


def to_plain(value: Any) -> Any:
    """Reduces a value to what `torch.load(weights_only=True)` and `yaml.safe_load` accept."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (torch.Tensor, np.generic, np.ndarray)):
        return to_plain(value.tolist())
    return str(value)
