"""Reads checkpoints safely and loads weights that must fit exactly. The file format is timm's, with plain types."""
import argparse
import logging
import os
import pickle
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from timm.models import clean_state_dict

from cpool_vision.errors import CheckpointError, CheckpointNotFoundError
from cpool_vision.reading import reason

from .seal import check_seal

_logger = logging.getLogger(__name__)
Plain: TypeAlias = 'None | bool | int | float | str | list[Plain] | dict[str, Plain]'


def read_checkpoint(path: str, flag: str) -> dict[str, object]:
    """Reads a checkpoint onto the CPU without executing code from it.

    Args:
        path: File written by `torch.save`, or `.safetensors` file.
        flag: Flag that named the file, for messages.

    Returns:
        The dictionary in the file.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointVersionError: If a newer release wrote it.
        CheckpointError: If it is damaged, is not a checkpoint, or contains objects other than tensors and plain values.
    """
    if os.path.isdir(path):
        raise CheckpointNotFoundError(f'{flag} {path!r} is a folder: name a checkpoint file in it')
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f'{flag} {path!r} is not a regular file: use a copy')
    if not os.path.isfile(path):
        raise CheckpointNotFoundError(f'{flag} {path!r} does not exist: check the path')
    try:
        if path.endswith('.safetensors'):
            content: object = safetensors.torch.load_file(path)
        else:
            check_seal(path, flag)
            # timm's own training checkpoints contain their arguments as a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{flag} {path!r} was refused: it contains objects other than tensors and plain values, or is not a '
            'checkpoint; ask its author for a safetensors file') from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{flag} {path!r} cannot be read: it is damaged or not a checkpoint ({reason(error)}); '
                              'use another copy') from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{flag} {path!r} contains a {type(content).__name__}: expected a dictionary of weights')
    return dict(content)


def pick_weights(content: Mapping[str, object], use_ema: bool) -> tuple[dict[str, torch.Tensor], bool]:
    """Returns the weights in a checkpoint, without DDP and compile prefixes, and whether they are averaged."""
    keys = (['state_dict_ema', 'model_ema'] if use_ema else []) + ['state_dict', 'model']
    for key in keys:
        weights = content.get(key)
        if isinstance(weights, Mapping):
            return clean_state_dict(dict(weights)), key.endswith('_ema')
    return clean_state_dict(dict(content)), False


def weights_of(content: Mapping[str, object], path: str, flag: str, use_ema: bool) -> dict[str, torch.Tensor]:
    """Returns the weights in a checkpoint.

    Args:
        content: Dictionary of the checkpoint.
        path: Its file, for messages.
        flag: Flag that named the file, for messages.
        use_ema: Prefer the averaged weights.

    Raises:
        CheckpointError: If it contains no weights.
    """
    weights, is_ema = pick_weights(content, use_ema)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f'{flag} {path!r} contains no model weights: expected a state dict')
    _logger.info('Loaded %s weights from %s.', 'averaged' if is_ema else 'model', path)
    return weights


def describe_misfit(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    """Describes why the weights `given` do not load into a model with the weights `expected`; '' if they fit."""
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
    """Loads weights that must fit the model exactly. If they do not, the model is unchanged.

    Args:
        model: The model.
        weights: Its weights.
        path: File of the weights, for messages.
        flag: Flag that named the file, for messages.
        name: Name of the model, for messages.

    Raises:
        CheckpointError: If the weights belong to another architecture or number of classes.
    """
    expected = model.state_dict()
    misfit = describe_misfit(expected, weights)
    if misfit:
        same_keys = set(expected) == set(weights)
        remedy = 'set --num-classes, --in-chans or the input size as in training' if same_keys \
            else 'name the --model (and --model-kwargs) that it was trained with'
        raise CheckpointError(f'{flag} {path!r} does not fit model {name!r}: {misfit}; {remedy}')
    model.load_state_dict(dict(weights), strict=True)


def to_plain(value: object) -> Plain:
    """Converts a value to plain types, which `torch.load(weights_only=True)` and `yaml.safe_load` accept."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)  # without a subclass such as IntEnum
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.generic, np.ndarray)):
        return to_plain(value.tolist())
    return str(value)
