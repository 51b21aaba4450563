"""The model that is validated: its weights, its classes, and the form in which it is measured."""
import logging
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
    """A model ready to be measured.

    Attributes:
        settings: what was asked for.
        runtime: where and how.
        classes: outputs of the model.
        model: with its weights, compiled if asked for.
        parameters: how many.
        data_config: input size, normalization, interpolation, crop.
        crop_pct: side of the crop over the resized side.
        valid_labels: outputs that compete, None for all.
        subset: folders and classes of `--class-subset`.
        cost: see `cost.measure_cost`; None if not asked for.
        numbers: those of the classes by name as the model was trained with them; empty if not known.
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


def _warn_of_mismatch(settings: ValidateSettings, content: dict[str, Any], data_config: InputConfig) -> None:
    """Warns if the measurement differs from what the checkpoint contains or was trained with."""
    averaged = any(content.get(key) is not None for key in ('state_dict_ema', 'model_ema'))
    if settings.use_ema and content and not averaged:
        _logger.warning('--use-ema: %s has no averaged weights; its plain weights are measured.', settings.checkpoint)
    trained = settings_of(content)
    size = trained.get('input_size') or trained.get('img_size')
    side = size[-1] if isinstance(size, (list, tuple)) and size else size
    if isinstance(side, int) and side != data_config['input_size'][-1]:
        _logger.warning('%s was trained on images of %d pixels and is measured on %d: pass --img-size %d to measure '
                        'it as it was trained.', settings.checkpoint, side, data_config['input_size'][-1], side)
    for key in ('mean', 'std'):
        values = trained.get(key)
        if isinstance(values, (list, tuple)) and list(values) != list(data_config[key]):
            _logger.warning(
                '%s was trained with --%s %s and is measured with %s: pass the former to agree with the training run.',
                settings.checkpoint, key, ' '.join(map(str, values)), ' '.join(map(str, data_config[key])))


@torch.inference_mode()
def _warm_up(model: Any, size: tuple[int, ...], settings: ValidateSettings, runtime: Runtime) -> None:
    """One unmeasured batch: the first call compiles and allocates."""
    image = torch.zeros((settings.batch_size, *size), device=runtime.device,
                        dtype=runtime.precision.model_dtype or torch.float32)
    if settings.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with runtime.precision.autocast():
        model(image)


def known_classes(content: dict[str, Any], model: nn.Module, num_classes: int) -> dict[str, int]:
    """Numbers of the classes by name that a model was trained with, from its checkpoint or its configuration."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if classes_in(content) or not names or not len(names) == len(set(names)) == num_classes:
        return classes_in(content)
    return {name: index for index, name in enumerate(names)}


def prepare(settings: ValidateSettings, runtime: Runtime) -> Subject:
    """The model on the CPU, with its weights, and what the checkpoint and the flags say of its classes.

    Raises:
        UserError: see `model.load_eval_model` and `labels`.
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
            raise ConfigError('--real-labels go with all classes: drop --class-subset, or name imagenet-1k')
    elif settings.valid_labels:
        subject.valid_labels = read_valid_labels(settings.valid_labels, classes.count)
    return subject


def compile_subject(subject: Subject) -> None:
    """Puts the model on its device in the form that is measured, and measures its cost if asked for."""
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
        torch.distributed.barrier()  # the others would take its time
