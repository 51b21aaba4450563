"""Checkpoint files: safe reading, exact fit, atomic writing. The format is timm's, holding plain types only."""
import argparse
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from timm.models import clean_state_dict

from .errors import CheckpointError, CheckpointNotFoundError, OutputError

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
        CheckpointError: damaged, not a checkpoint, or it contains objects other than tensors and plain values.
    """
    if not os.path.isfile(path):
        raise CheckpointNotFoundError(f'{flag} {path!r} does not exist: check the path')
    try:
        if path.endswith('.safetensors'):
            content: Any = safetensors.torch.load_file(path)
        else:
            # timm's own training checkpoints hold their arguments as a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{flag} {path!r} was refused: it holds objects other than tensors and plain values, or is no checkpoint; '
            'ask its author for a safetensors file') from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise CheckpointError(f'{flag} {path!r} cannot be read, it is damaged or no checkpoint ({reason}): '
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


def read_weights(path: str, flag: str, use_ema: bool) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint file; the averaged ones if asked for and present.

    Raises:
        CheckpointNotFoundError, CheckpointError: see `read_checkpoint`; also if the file holds no tensors.
    """
    weights, is_ema = pick_weights(read_checkpoint(path, flag), use_ema)
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


def _sync_directory(path: str) -> None:
    if os.name != 'posix':
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str, write: Callable[[Any], None]) -> None:
    """Writes a file so that a crash at any moment leaves either the former content or the new one.

    A temporary file in the same folder is written, flushed to disk and renamed over the target; then the folder is
    flushed. A failure removes the temporary file and leaves the target alone.

    Args:
        path: target.
        write: receives the open binary file.

    Raises:
        OutputError: the operating system refused.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = ''
    try:
        handle, temporary = tempfile.mkstemp(prefix=f'.{os.path.basename(path)}.', suffix='.tmp', dir=folder)
        with os.fdopen(handle, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = ''
        _sync_directory(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, 'strerror', None) or error
        raise OutputError(f'{path!r} cannot be written ({reason}): free space or choose another folder') from error
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def link_atomic(source: str, target: str) -> None:
    """Gives a finished file a second name, by a hard link where the file system has them, never unlinking first.

    Raises:
        OutputError: the operating system refused.
    """
    temporary = os.path.join(os.path.dirname(os.path.abspath(target)), f'.{os.path.basename(target)}.link.tmp')
    try:
        if os.path.exists(temporary):
            os.remove(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, 'rb') as file:
                write_atomic(target, lambda out: shutil.copyfileobj(file, out))
            return
        os.replace(temporary, target)
        _sync_directory(os.path.dirname(os.path.abspath(target)))
    except OSError as error:
        raise OutputError(f'{target!r} cannot be written ({error.strerror or error})') from error
    finally:
        if os.path.exists(temporary):  # a rename between two names of one file leaves the first
            os.remove(temporary)
