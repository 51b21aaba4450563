"""Validation of one model on one split."""
import argparse
import logging
import os
import time
from typing import Any

import torch
import torch.nn as nn
from timm.data import RealLabelsImagenet
from timm.layers import apply_test_time_pool
from timm.utils import reparameterize_model
from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

import cpool_vision  # noqa: F401 - registers the variants

from .checkpoint import read_checkpoint
from .data import UNREADABLE, build_eval_loader
from .device import Precision, resolve_precision, seed_everything, setup_device
from .errors import ConfigError, DatasetError
from .evaluate import evaluate
from .model import create_eval_model, resolve_input
from .naflex import build_naflex_eval_loader

_logger = logging.getLogger(__name__)


class AveragedMetrics:
    """Precision, recall and F1 in percent, averaged over classes by torchmetrics.

    Args:
        num_classes: number of classes that compete.
        average: micro, macro or weighted.
        device: device of the logits.
    """

    def __init__(self, num_classes: int, average: str, device: torch.device) -> None:
        self.average = average
        kinds = {'precision': MulticlassPrecision, 'recall': MulticlassRecall, 'f1_score': MulticlassF1Score}
        self.metrics = {name: kind(num_classes, average=average, validate_args=False).to(device)
                        for name, kind in kinds.items()}

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds logits (B, classes) and class indices (B,), unreadable images apart."""
        known = target != UNREADABLE
        output, target = output[known].float(), target[known]
        if len(target):
            for metric in self.metrics.values():
                metric.update(output, target)

    def compute(self) -> dict[str, float]:
        """The figures, as timm names them: AVERAGE_precision, AVERAGE_recall, AVERAGE_f1_score."""
        return {f'{self.average}_{name}': round(100 * float(metric.compute()), 4)
                for name, metric in self.metrics.items()}


def read_valid_labels(path: str, num_classes: int) -> list[int]:
    """Class indices of `--valid-labels`, one a line.

    Raises:
        ConfigError: missing file, a line that is no class of the model, or a class named twice.
    """
    try:
        with open(path, encoding='utf-8') as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise ConfigError(f'--valid-labels {path!r} cannot be read ({error.strerror}): check the path') from error
    bad = next((line for line in lines if not line.isdigit() or int(line) >= num_classes), None)
    if bad is not None or not lines:
        raise ConfigError(f'--valid-labels {path!r}: {bad!r} is no class index below {num_classes}: one index a line')
    labels = [int(line) for line in lines]
    if len(set(labels)) < len(labels):
        raise ConfigError(f'--valid-labels {path!r} names a class twice: remove the repetition')
    return labels


def _real_labels(dataset: Any, path: str, num_classes: int) -> RealLabelsImagenet:
    if not os.path.isfile(path):
        raise ConfigError(f'--real-labels {path!r} does not exist: check the path')
    if num_classes != 1000:
        raise ConfigError(f'--real-labels are for models of the 1000 ImageNet classes, this one has {num_classes}: '
                          'leave them out')
    reason: Exception | None = None
    try:
        names = dataset.filenames(basename=True)
        labels = RealLabelsImagenet(names, real_json=path)
    except (AssertionError, AttributeError, KeyError, ValueError) as error:
        names, labels, reason = [''], None, error
    if labels is None or any(name not in labels.real_labels for name in names):
        raise ConfigError('--real-labels needs the 50,000 ImageNet validation images under their own names '
                          '(ILSVRC2012_val_00000001.JPEG ...), and a JSON list of as many: check both') from reason
    return labels


def _check(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ConfigError(f'--batch-size must be >= 1, got {args.batch_size}')
    if args.seed < 0:
        raise ConfigError(f'--seed must be >= 0, got {args.seed}')
    if args.num_gpu < 1 or args.num_gpu > 1 and torch.cuda.device_count() < args.num_gpu:
        raise ConfigError(f'--num-gpu {args.num_gpu}: {torch.cuda.device_count()} CUDA devices are available')
    if args.real_labels and args.valid_labels:
        raise ConfigError('--real-labels and --valid-labels exclude each other: drop one of them')


def _generate_code(model: nn.Module, args: argparse.Namespace) -> Any:
    if args.torchscript:
        return torch.jit.script(model)
    if args.torchcompile:
        torch._dynamo.reset()
        return torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.aot_autograd:
        from functorch.compile import memory_efficient_fusion
        return memory_efficient_fusion(model)
    return model


def _warn_of_mismatch(args: argparse.Namespace, data_config: dict[str, Any]) -> None:
    """Says where the measurement departs silently from what the checkpoint holds or was trained with."""
    if not args.checkpoint or args.checkpoint.endswith(('.npz', '.npy')):
        return
    content = read_checkpoint(args.checkpoint, '--checkpoint')
    if args.use_ema and not any(content.get(key) is not None for key in ('state_dict_ema', 'model_ema')):
        _logger.warning('--use-ema: %s has no averaged weights; its plain weights are measured.', args.checkpoint)
    trained = content.get('args') or {}
    if isinstance(trained, argparse.Namespace):  # timm's own checkpoints
        trained = vars(trained)
    for key in ('mean', 'std'):
        values = trained.get(key)
        if values and list(values) != list(data_config[key]):
            _logger.warning(
                '%s was trained with --%s %s and is measured with %s: pass the former to agree with the training run.',
                args.checkpoint, key, ' '.join(map(str, values)), ' '.join(map(str, data_config[key])))


@torch.inference_mode()
def _warm_up(model: Any, size: tuple[int, ...], args: argparse.Namespace, device: torch.device, precision: Precision,
             ) -> None:
    """One unmeasured batch: the first call compiles and allocates."""
    image = torch.zeros((args.batch_size, *size), device=device, dtype=precision.model_dtype or torch.float32)
    if args.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with precision.autocast():
        model(image)


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one model.

    Args:
        args: settings as `config.parse_args(args_validate.build_parser)` gives them; changed in place. Without
            `--checkpoint` the model's pretrained weights are loaded, as in timm.

    Returns:
        The row of results: `model`, `top1`, `top1_err`, `top5`, `top5_err` (percent), precision, recall and F1 if
        asked for, `param_count` (millions), `img_size`, `crop_pct`, `interpolation`, `loss`, `images`,
        `images_per_sec`.

    Raises:
        DatasetError: images that cannot be read; also see `data.build_dataset`.
        UserError: other bad input; see `engine.errors`.
    """
    _check(args)
    args.pretrained = args.pretrained or not args.checkpoint
    if args.data and not args.data_dir:
        args.data_dir = args.data
    device = setup_device(args, distributed=False)
    precision = resolve_precision(args, device)
    seed_everything(args.seed)

    model = create_eval_model(args)
    if args.reparam:
        model = reparameterize_model(model)
    params = sum(parameter.numel() for parameter in model.parameters())
    _logger.info('Model %s: %d parameters.', args.model, params)
    data_config = resolve_input(model, args, use_test_size=not args.use_train_size)
    _warn_of_mismatch(args, data_config)
    pooled = False
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
    crop_pct = 1.0 if pooled else data_config['crop_pct']

    if args.naflex_loader:
        loader = build_naflex_eval_loader(args, model, data_config, device, precision, args.split, args.batch_size,
                                          args.num_samples)
    else:
        loader = build_eval_loader(
            args, data_config, device, precision, args.split, args.batch_size, args.num_samples,
            crop_pct=crop_pct,
            crop_mode=data_config['crop_mode'],
            crop_border_pixels=args.crop_border_pixels,
            tf_preprocessing=args.tf_preprocessing)
    valid_labels = read_valid_labels(args.valid_labels, args.num_classes) if args.valid_labels else None
    real = _real_labels(loader.dataset, args.real_labels, args.num_classes) if args.real_labels else None
    averaged = None
    if args.metrics_avg:
        averaged = AveragedMetrics(len(valid_labels or range(args.num_classes)), args.metrics_avg, device)

    model = model.to(device=device, dtype=precision.model_dtype).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = _generate_code(model, args)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    _warm_up(model, data_config['input_size'], args, device, precision)

    def on_batch(output: torch.Tensor, target: torch.Tensor, positions: list[int]) -> None:
        if real is not None:
            real.add_result(output)
        if averaged is not None:
            averaged.add(output, target)

    started = time.perf_counter()
    result = evaluate(
        model, loader, device, precision,
        prefetched=not args.no_prefetcher, channels_last=args.channels_last, log_interval=args.log_freq, title='Test',
        valid_labels=valid_labels, on_batch=on_batch)
    _logger.info('%d images in %.1f s.', result.metrics['images'], time.perf_counter() - started)
    _refuse_unreadable(loader.dataset, result.unreadable_positions, int(result.metrics['images']))

    top1, top5 = result.metrics['top1'], result.metrics['top5']
    if real is not None:
        top1, top5 = real.get_accuracy(k=1), real.get_accuracy(k=5)
    row = {
        'model': args.model,
        'top1': round(top1, 4), 'top1_err': round(100 - top1, 4),
        'top5': round(top5, 4), 'top5_err': round(100 - top5, 4),
        **(averaged.compute() if averaged is not None else {}),
        'param_count': round(params / 1e6, 2),
        'img_size': data_config['input_size'][-1],
        'crop_pct': crop_pct,
        'interpolation': data_config['interpolation'],
        'loss': round(result.metrics['loss'], 4),
        'images': result.metrics['images'],
        'images_per_sec': round(result.images_per_sec, 2),
    }
    _logger.info(' * ' + '  '.join(f'{key} {value}' for key, value in row.items() if key != 'model'))
    return row


def _refuse_unreadable(dataset: Any, positions: list[int], readable: int) -> None:
    if not positions:
        return
    names = ', '.join(str(dataset.filename(position)) for position in positions[:5])
    more = f' and {len(positions) - 5} more' if len(positions) > 5 else ''
    raise DatasetError(f'{len(positions)} of {readable + len(positions)} images cannot be read: {names}{more}; '
                       'restore or remove them, the accuracy would be wrong')
