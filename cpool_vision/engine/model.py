"""Creates models and loads their weights, with errors that say what to do."""
import difflib
import logging
import math
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from functools import cache
from typing import Any

import safetensors
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import create_model, is_model, list_models, resolve_model_input_args
from timm.models import load_checkpoint as load_numpy_checkpoint

from cpool_vision.errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnknownModelError
from cpool_vision.reading import reason

from .checkpoints.checkpoint import load_weights, read_checkpoint, weights_of
from .device import Runtime
from .settings.limits import CHOICES
from .settings.shared import InputConfig, ModelSettings
from .settings.train import NetworkSettings, TrainSettings

_logger = logging.getLogger(__name__)


@cache
def settle_hub() -> None:
    """Checks once per process whether the Hugging Face Hub answers; if not, switches to its local cache."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    host = urllib.parse.urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or '', host.port or 443), timeout=5).close()
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        _logger.warning('%s cannot be reached (%s). Using cached pretrained weights only.', host.hostname,
                        reason(error))


def check_model_name(name: str) -> None:
    """Checks that a model name is registered or refers to a model folder or repository.

    Raises:
        UnknownModelError: It does not; the message lists close matches.
    """
    source, _, rest = name.partition(':')
    if rest and source in ('hf-hub', 'hf_hub'):
        return
    if rest and source == 'local-dir':
        if not os.path.isfile(os.path.join(rest, 'config.json')):
            raise UnknownModelError(f'--model {name!r}: {rest!r} is not a model folder, as it has no config.json')
        return
    arch = name.split('.', 1)[0]
    if is_model(arch):
        return
    # if no name is similar, suggest variants of this package
    close = difflib.get_close_matches(arch, list_models(), n=4, cutoff=0.6) or list_models('*cpool*')[:4]
    raise UnknownModelError(f'unknown model {name!r}: close matches: {", ".join(close)}')


def _build(settings: ModelSettings, **kwargs: Any) -> nn.Module:
    check_model_name(settings.model)
    kwargs.update(
        pretrained=settings.pretrained,
        in_chans=settings.input_size[0] if settings.in_chans is None and settings.input_size else settings.in_chans,
        num_classes=settings.num_classes,
        global_pool=settings.gp,
        scriptable=settings.torchscript,
    )
    clash = sorted(set(settings.model_kwargs) & set(kwargs))
    if clash:
        raise ConfigError(f'--model-kwargs {clash[0]!r} has its own flag: use that')
    if settings.pretrained or settings.model.startswith(('hf-hub:', 'hf_hub:')):
        settle_hub()
    try:
        # models with a fixed input size must be created for the size they will be used with
        size = resolve_model_input_args(settings.model, settings.as_dict(), **settings.model_kwargs).get('img_size')
        model = create_model(settings.model, **{**kwargs, **settings.model_kwargs, 'img_size': size})
        if ':' in settings.model and 'pretrained_cfg_overlay' not in kwargs:
            _check_classes(getattr(model, 'pretrained_cfg', None) or {})
        return model
    except ValueError as error:
        raise UnknownModelError(f'model {settings.model!r} cannot be built as requested ({error}): '
                                'check --img-size, --input-size, --in-chans and --model-kwargs') from error
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError,
            ZeroDivisionError) as error:
        raise UnknownModelError(f'model {settings.model!r} cannot be built as requested ({reason(error)}): '
                                'check --model-kwargs, --gp, the --bn- and the --drop- flags') from error
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if not settings.pretrained and ':' not in settings.model:
            raise UnknownModelError(f'model {settings.model!r} cannot be built as requested ({reason(error)}): check '
                                    '--model-kwargs') from error
        raise UnknownModelError(
            f'pretrained weights of {settings.model!r} cannot be loaded ({reason(error, 300)}): drop --pretrained, or '
            'use a local-dir: folder or a checkpoint') from error


def _check_classes(config: Mapping[str, object]) -> None:
    """Raises ValueError if a downloaded config.json has an invalid number of classes or invalid class names."""
    count, names = config.get('num_classes', 0), config.get('label_names')
    if type(count) is not int or count < 0:
        raise ValueError(f'num_classes of its config.json must be a number >= 0, got {count!r}')
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise ValueError('label_names of its config.json must be a list of names, got '
                         f'{reason(ValueError(repr(names)), 60)}')
    if names is not None and len(names) != count:
        raise ValueError(f'its config.json has {len(names)} label_names for num_classes {count}')


def _check_input(config: dict[str, Any]) -> None:
    """Raises ValueError if a downloaded config.json has invalid input settings."""
    size, interpolation, crop = config['input_size'], config['interpolation'], config['crop_pct']
    if len(size) != 3 or not all(isinstance(each, int) and each > 0 for each in size):
        raise ValueError(f'input_size must be three numbers above 0, got {size!r}')
    for name in ('mean', 'std'):
        values = config[name]
        if isinstance(values, str) or len(values) not in (1, size[0]) or not all(
                isinstance(each, (int, float)) and math.isfinite(each) and (name == 'mean' or each > 0)
                for each in values):
            raise ValueError(f'{name} must be {size[0]} numbers{" above 0" if name == "std" else ""}, got {values!r}')
    if interpolation not in CHOICES['interpolation']:
        raise ValueError(f'interpolation must be one of {", ".join(filter(None, CHOICES["interpolation"]))}, '
                         f'got {interpolation!r}')
    if not isinstance(crop, (int, float)) or not 0 < crop < math.inf:
        raise ValueError(f'crop_pct must be a number above 0, got {crop!r}')


def resolve_input(model: nn.Module, settings: ModelSettings, use_test_size: bool = False) -> InputConfig:
    """Returns input size, normalization, interpolation and crop, from the flags or the model's configuration.

    Args:
        model: The model.
        settings: Flags; None stands for the model's own value.
        use_test_size: Use the model's test input size, if it has one.

    Raises:
        ConfigError: The flags contradict each other or the model, or the model's configuration is invalid.
    """
    try:
        config: Any = resolve_input_data_config(model, settings.as_dict(), use_test_size=use_test_size)
        _check_input(config)
        return config
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f'invalid input of {settings.model!r} ({error}): check --img-size, --input-size, --in-chans, '
                          '--mean and --std') from error


def load_model_weights(model: nn.Module, path: str, flag: str, name: str, use_ema: bool) -> dict[str, Any]:
    """Loads a checkpoint into a model; all keys and shapes must match.

    Args:
        model: The model.
        path: `.pth`, `.pth.tar`, `.safetensors`, or `.npz` for models that can load one.
        flag: Flag that the path comes from, for messages.
        name: Name of the model, for messages.
        use_ema: Load averaged weights if the file has them.

    Returns:
        Content of the file; empty for `.npz` and `.npy`.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        CheckpointError: The file is unreadable or unsafe, or does not match the model.
    """
    if os.path.splitext(path)[1].lower() in ('.npz', '.npy'):
        if not os.path.isfile(path):
            raise CheckpointNotFoundError(f'{flag} {path!r} does not exist: check the path')
        try:
            load_numpy_checkpoint(model, path)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise CheckpointError(f'{flag} {path!r} cannot be loaded into {name!r} ({error})') from error
        return {}
    content = read_checkpoint(path, flag)
    load_weights(model, weights_of(content, path, flag, use_ema), path, flag, name)
    return content


def create_train_model(settings: NetworkSettings) -> nn.Module:
    """Creates a model for training, on the CPU, with the weights that the flags ask for.

    Raises:
        UnknownModelError: The model is unknown or cannot be created as requested.
        CheckpointNotFoundError: A file of weights does not exist.
        CheckpointError: The weights cannot be read or do not match the model.
        ConfigError: Flags contradict each other, or the model does not support one.
    """
    overlay: dict[str, Any] = {}
    if settings.pretrained_path:
        if not os.path.isfile(settings.pretrained_path):
            raise CheckpointNotFoundError(
                f'--pretrained-path {settings.pretrained_path!r} does not exist: check the path')
        # num_classes -1 never equals the model's, so that timm leaves the head at its initialization
        overlay = {'pretrained_cfg_overlay': {'file': settings.pretrained_path, 'num_classes': -1}}
    drop_path = settings.drop_path
    if settings.drop_connect is not None and drop_path is None:
        _logger.warning('--drop-connect is deprecated. Use --drop-path.')
        drop_path = settings.drop_connect
    model: Any = _build(
        settings,
        drop_rate=settings.drop or None,
        drop_path_rate=drop_path,
        drop_block_rate=settings.drop_block,
        bn_momentum=settings.bn_momentum,
        bn_eps=settings.bn_eps,
        **overlay,
    )
    if settings.initial_checkpoint:
        load_model_weights(model, settings.initial_checkpoint, '--initial-checkpoint', settings.model, use_ema=True)
    _init_head(model, settings.head_init_scale, settings.head_init_bias)
    if settings.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(f'model {settings.model!r} has no gradient checkpointing: drop --grad-checkpointing') \
                from error
    return model


def _init_head(model: Any, scale: float | None, bias: float | None) -> None:
    if scale is None and bias is None:
        return
    head = model.get_classifier()
    if not isinstance(head, (nn.Linear, nn.Conv2d)) or head.bias is None:
        raise ConfigError('--head-init-scale and --head-init-bias need a classifier with weight and bias, '
                          f'this model has {type(head).__name__}: drop them')
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            head.bias.mul_(scale)
        if bias is not None:
            head.bias.fill_(bias)


def place_model(model: nn.Module, settings: TrainSettings, runtime: Runtime) -> nn.Module:
    """Moves a model to its device, dtype and memory layout for training; converts batch norms and scripts it if asked.

    Raises:
        ConfigError: Flags cannot be combined.
    """
    if settings.split_bn:
        if settings.aug_splits < 2 and not settings.resplit:
            raise ConfigError('--split-bn needs --aug-splits 2 or more, or --resplit: add one of them')
        if settings.sync_bn:
            raise ConfigError('--split-bn and --sync-bn cannot be combined: drop one of them')
        model = convert_splitbn_model(model, max(settings.aug_splits, 2))
    model = model.to(device=runtime.device, dtype=runtime.precision.model_dtype)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if runtime.distributed and settings.sync_bn:
        if settings.torchscript:
            raise ConfigError('--sync-bn does not work with --torchscript: drop one of them')
        model = convert_sync_batchnorm(model)
    if settings.torchscript:
        model = torch.jit.script(model)
    return model


def create_eval_model(name: str, checkpoint: str = '', *, pretrained: bool = False, use_ema: bool = False,
                      num_classes: int | None = None, in_chans: int | None = None, img_size: int | None = None,
                      model_kwargs: Mapping[str, object] | None = None) -> nn.Module:
    """Creates a model by name, on the CPU, in eval mode.

    Args:
        name: Registered name, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        checkpoint: Path of weights to load, which must match the model; '' for none.
        pretrained: Load the model's pretrained weights.
        use_ema: Load averaged weights if the checkpoint has them.
        num_classes: Number of classes, None for the model's default.
        in_chans: Number of image channels, None for the model's default.
        img_size: Side of a square input image in pixels, None for the model's default.
        model_kwargs: More arguments of the model.

    Raises:
        UnknownModelError: The model is unknown or cannot be created as requested.
        CheckpointNotFoundError: The checkpoint does not exist.
        CheckpointError: The checkpoint cannot be read or does not match the model.
        ConfigError: `model_kwargs` contains an argument of this function.
    """
    settings = ModelSettings(model=name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans,
                             img_size=img_size, model_kwargs=model_kwargs or {})
    return load_eval_model(settings, checkpoint, use_ema)[0].eval()


def load_eval_model(settings: ModelSettings, checkpoint: str, use_ema: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Creates a model for validation, on the CPU; returns it with the content of its checkpoint ({} without one).

    Raises: See `create_eval_model`.
    """
    model = _build(settings)
    if not checkpoint:
        return model, {}
    return model, load_model_weights(model, checkpoint, '--checkpoint', settings.model, use_ema)
