"""Prepares a model for validation: weights, classes, compilation and cost."""
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
from timm.layers import apply_test_time_pool
from timm.utils import reparameterize_model

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import ConfigError

from ..data.fingerprint import classes_in
from ..data.multi_label import Classes, names_of
from ..device import Runtime, seed_everything
from ..model import load_eval_model, resolve_input
from ..settings.shared import InputConfig, settings_of
from ..settings.validate import ValidateSettings
from .cost import count_macs, measure_cost
from .labels import ClassSubset, read_class_subset, read_valid_labels

_logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """A model to validate.

    Attributes:
        settings: Settings of the validation.
        runtime: Device and processes.
        classes: Number and names of the model's classes.
        model: Model with its weights; on the CPU after `prepare`, on its device after `compile_subject`.
        parameters: Number of parameters.
        data_config: Input size, normalization, interpolation and crop.
        crop_pct: Side of the crop relative to the resized side.
        valid_labels: Outputs to choose between, None for all.
        subset: Folders and classes of `--class-subset`.
        cost: Result of `measure_cost`; None without `--measure-cost`.
        numbers: Class index of each class name in training; empty if unknown.
    """

    settings: ValidateSettings
    runtime: Runtime
    classes: Classes
    model: Any
    parameters: int
    data_config: InputConfig
    crop_pct: float
    valid_labels: list[int] | None = None
    subset: ClassSubset | None = None
    cost: dict[str, float] | None = None
    numbers: dict[str, int] = field(default_factory=dict)


def _generate_code(model: nn.Module, settings: ValidateSettings) -> Any:
    if settings.torchscript:
        return torch.jit.script(model)
    if settings.torchcompile:
        torch._dynamo.reset()
        return torch.compile(model, backend=settings.torchcompile, mode=settings.torchcompile_mode)
    if settings.aot_autograd:
        from functorch.compile import memory_efficient_fusion
        return memory_efficient_fusion(model)
    return model


def _warn_of_mismatch(settings: ValidateSettings, content: Mapping[str, object], data_config: InputConfig) -> None:
    """Warns if the checkpoint lacks averaged weights or was trained with another input."""
    averaged = any(content.get(key) is not None for key in ('state_dict_ema', 'model_ema'))
    if settings.use_ema and content and not averaged:
        _logger.warning('--use-ema: %s has no averaged weights. Using its plain weights.', settings.checkpoint)
    trained = settings_of(content)
    size = trained.get('input_size') or trained.get('img_size')
    side = size[-1] if isinstance(size, (list, tuple)) and size else size
    if isinstance(side, int) and side != data_config['input_size'][-1]:
        _logger.warning('%s was trained at image size %d and is validated at %d. Pass --img-size %d to validate it at '
                        'the training size.', settings.checkpoint, side, data_config['input_size'][-1], side)
    for key in ('mean', 'std'):
        values = trained.get(key)
        if isinstance(values, (list, tuple)) and list(values) != list(data_config[key]):
            text = ' '.join(map(str, values))
            _logger.warning('%s was trained with --%s %s and is validated with %s. Pass --%s %s to validate it as it '
                            'was trained.', settings.checkpoint, key, text, ' '.join(map(str, data_config[key])), key,
                            text)


@torch.inference_mode()
def _warm_up(model: nn.Module, size: tuple[int, ...], settings: ValidateSettings, runtime: Runtime) -> None:
    """Runs a batch that is not timed: the first call compiles and allocates."""
    image = torch.zeros((settings.batch_size, *size), device=runtime.device,
                        dtype=runtime.precision.model_dtype or torch.float32)
    if settings.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with runtime.precision.autocast():
        model(image)


def known_classes(content: Mapping[str, object], model: nn.Module, num_classes: int) -> dict[str, int]:
    """Returns the class index of each class name in training, from the checkpoint or the model's configuration."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if classes_in(content) or not names or not len(names) == len(set(names)) == num_classes:
        return classes_in(content)
    return {name: index for index, name in enumerate(names)}


def prepare(settings: ValidateSettings, runtime: Runtime) -> Subject:
    """Loads a model on the CPU, and finds its input and classes from the checkpoint and the flags.

    Raises:
        UserError: The model or its weights cannot be loaded (see `load_eval_model`), or its classes do not fit the
            flags (see `labels`).
    """
    seed_everything(settings.seed)
    wanted = replace(settings, pretrained=settings.pretrained or not settings.checkpoint)
    model, content = load_eval_model(wanted, settings.checkpoint, settings.use_ema)
    classes = Classes(settings.num_classes or model.num_classes)  # type: ignore[arg-type]
    if settings.reparam:
        model = reparameterize_model(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info('Model %s: %d parameters.', settings.model, parameters)
    data_config = resolve_input(model, settings, use_test_size=not settings.use_train_size)
    _warn_of_mismatch(settings, content, data_config)
    classes.names = names_of(content, settings.checkpoint, settings.task, refuse=False)
    numbers = known_classes(content, model, classes.count)
    del content  # as large as model and optimizer
    pooled = False
    if settings.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
    subject = Subject(settings, runtime, classes, model, parameters, data_config,
                      1.0 if pooled else data_config['crop_pct'], numbers=numbers)
    if settings.class_subset:
        subject.subset = read_class_subset(settings.class_subset, classes.count)
        if len(subject.subset.valid_labels) < classes.count:
            subject.valid_labels = subject.subset.valid_labels
        if subject.valid_labels and settings.real_labels:
            raise ConfigError('--real-labels needs all classes: drop --class-subset, or use --class-subset imagenet-1k')
    elif settings.valid_labels:
        subject.valid_labels = read_valid_labels(settings.valid_labels, classes.count)
    return subject


def compile_subject(subject: Subject) -> None:
    """Moves the model to its device, compiles it and, with `--measure-cost`, measures its cost."""
    settings, runtime = subject.settings, subject.runtime
    device, dtype, size = runtime.device, runtime.precision.model_dtype, subject.data_config['input_size']
    model = subject.model.to(device=device, dtype=dtype).eval()
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    macs = None
    if settings.measure_cost and runtime.primary:
        macs = count_macs(model, torch.zeros((1, *size), device=device, dtype=dtype or torch.float32))
    model = _generate_code(model, settings)
    if settings.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(settings.num_gpu)))
    subject.model = model
    _warm_up(model, size, settings, runtime)
    if macs is not None:
        subject.cost = {'parameters': subject.parameters, 'macs': macs, **measure_cost(
            model, size, settings.batch_size, device, runtime.precision, settings.channels_last)}
    if settings.measure_cost and runtime.distributed:
        torch.distributed.barrier()  # other processes would slow down the measurement
