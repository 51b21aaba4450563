"""What flags lead to, in a form that can be compared."""
import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loader_tools import INPUT, builder
from timm.layers import set_fast_norm
from timm.models import create_model
from timm.task import distillation

from cpool_vision.engine import device, model
from cpool_vision.engine.data import dataset
from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.settings.config import read_validate
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.train import build, loss, objective, validator
from cpool_vision.engine.train import loop as train_loop
from cpool_vision.engine.validate import run as validate_run
from cpool_vision.engine.validate import subject
from cpool_vision.errors import ConfigError

CPU = torch.device('cpu')


def plain(value: Any) -> Any:
    """Nested values with tensors replaced by shape, dtype, layout and hash."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
        return tuple(value.shape), str(value.dtype), value.stride(), digest
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


class Probes:
    """Each method takes flags and returns what they lead to; `patch` is undone after the test."""

    def __init__(self, root: str, base: list[str], train_args: Callable[..., Any],
                 run: Callable[..., dict[str, Any]], patch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                 ) -> None:
        self.root, self.base, self.run_train, self.patch, self.caplog = root, base, run, patch, caplog
        self.train_args = train_args
        self.runs = 0
        self.real: dict[Any, Any] = {}

    def parse(self, *flags: str) -> TrainSettings:
        return self.train_args(
            '--device', 'cpu', '--num-classes', '3', '--model', 'test_resnet', '--img-size', '32', *flags)

    def runtime(self, settings: TrainSettings, world_size: int = 1) -> device.Runtime:
        return device.Runtime(CPU, device.resolve_precision(settings, CPU), 0, world_size)

    def spy(self, place: Any, name: str, result: Callable[..., Any] | None = None) -> list[Any]:
        """Records the calls of a function, which goes on to the real one or to `result`."""
        calls: list[Any] = []
        real = result or self.real.setdefault((place, name), getattr(place, name))

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append([[item for item in args if isinstance(item, (str, int, bool))],
                          {key: repr(item) for key, item in kwargs.items() if 'object at 0x' not in repr(item)}])
            return real(*args, **kwargs)

        self.patch.setattr(place, name, record)
        return calls

    def dataset(self, *flags: str) -> Any:
        args = self.parse(*flags)
        built = dataset.build_dataset(
            args, Classes(args.num_classes), args.train_split, True, data.image_mode(args, INPUT),
            args.train_num_samples)
        return len(built), built[0][0].mode, [built[index][1] for index in range(len(built))]

    def create_dataset(self, *flags: str) -> Any:
        calls = self.spy(dataset, 'create_dataset', lambda *_, **__: [0])
        args = self.parse('--dataset', 'hfds/some/set', '--data-dir', self.root, *flags)
        dataset.build_dataset(args, Classes(args.num_classes), args.train_split, True, 'RGB', None)
        return calls

    def eval_loader(self, *flags: str) -> Any:
        calls = self.spy(data, 'build_eval_loader')
        self.run(*flags, '--epochs', '1')
        return calls

    def batches(self, *flags: str) -> Any:
        return plain(builder(self.root, self.train_args)(*flags).take(1))

    def torch_loader(self, *flags: str) -> Any:
        return builder(self.root, self.train_args)(*flags).loader.loader.loader.pin_memory

    def create_loader(self, *flags: str) -> Any:
        calls = self.spy(data, 'create_loader')
        builder(self.root, self.train_args)(*flags)
        return calls

    def model(self, *flags: str) -> Any:
        args = self.parse(*flags)
        torch.manual_seed(0)
        built: Any = model.create_train_model(args)
        settings = getattr(built, 'grad_checkpointing', None), getattr(built, 'drop_rate', None)
        built = model.place_model(built, args, self.runtime(args))
        return repr(built), settings, plain(built.state_dict())

    def create_model(self, *flags: str) -> Any:
        calls = self.spy(model, 'create_model', lambda name, **_: create_model(name, num_classes=3))
        model.create_train_model(self.parse(*flags))
        return calls

    def input(self, *flags: str) -> Any:
        return repr(model.resolve_input(create_model('test_resnet'), self.parse(*flags)))

    def device(self, *flags: str) -> Any:
        fuser = self.spy(device.utils, 'set_jit_fuser')
        norm = self.spy(device, 'set_fast_norm')
        args = self.parse(*flags)
        runtime = device.start_runtime(args)
        set_fast_norm(False)
        exact = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        return len(norm), fuser, exact, repr(runtime.precision)

    def task(self, *flags: str) -> Any:
        args = self.parse(*flags)
        calls: list[Any] = []
        fake = SimpleNamespace(
            compile=lambda **kw: calls.append(kw), prepare_distributed=lambda **kw: calls.append(kw),
            has_ema=lambda: False, get_eval_model=lambda: None)
        build._compile_and_distribute(args, self.runtime(args, 2), fake)
        return calls

    def sync_bn(self, *flags: str) -> Any:
        args = self.parse(*flags)
        calls = self.spy(model, 'convert_sync_batchnorm')
        built = model.place_model(create_model('test_resnet'), args, self.runtime(args, 2))
        return len(calls), repr(built)

    def dist_bn(self, *flags: str) -> Any:
        args = self.parse(*flags)
        calls = self.spy(validator.utils, 'distribute_bn', lambda *_: None)
        validator.average_statistics(args, self.runtime(args, 2), None)
        return calls

    def optimizer(self, *flags: str) -> Any:
        args = self.parse('--lr', '0.1', *flags)
        built = objective.build_optimizer(args, create_model('test_resnet'), objective.resolve_lr(args))
        groups = [{key: value if key != 'params' else len(value) for key, value in group.items()}
                  for group in built.param_groups]
        return type(built).__name__, repr(groups)

    def run(self, *flags: str) -> Any:
        self.runs += 1
        result = self.run_train('--experiment', f'{self.runs}', *flags)
        rows = [{key: value for key, value in row.items() if 'per_sec' not in key} for row in result['epochs']]
        content = torch.load(os.path.join(result['folder'], 'last.pth.tar'), weights_only=True)
        weights = {key: value for key, value in content.items() if key.startswith('state_dict')}
        return rows, result['metric'], sorted(os.listdir(result['folder'])), plain(weights)

    def synchronize(self, *flags: str) -> Any:
        calls = self.spy(train_loop, '_synchronize')
        self.run(*flags, '--epochs', '1')
        return len(calls)

    def log(self, *flags: str) -> Any:
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO):
            self.run(*flags, '--epochs', '1')
        return sum('Train: ' in record.getMessage() for record in self.caplog.records)

    def base_lr(self, *flags: str) -> Any:
        return objective.resolve_lr(self.parse(*flags))

    def curve(self, *flags: str) -> Any:
        args = self.parse('--epochs', '10', '--warmup-epochs', '2', *flags)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        scheduler, epochs = objective.build_scheduler(args, optimizer, 1, decreasing=False)
        rates = []
        for epoch in range(epochs):
            rates.append(optimizer.param_groups[0]['lr'])
            scheduler.step(epoch + 1, 1.)
        return rates

    def loss(self, *flags: str) -> Any:
        logits = torch.tensor([[2., 0.5, -1.], [0.3, 0.1, 0.2], [-2., 1., 0.]])
        return loss.build_loss(self.parse(*flags), Classes(3))(logits, torch.tensor([0, 2, 1])).item()

    def distillation(self, *flags: str) -> Any:
        self.patch.setattr(distillation, 'create_model',
                           lambda **kw: create_model(**{**kw, 'pretrained': False}))
        torch.manual_seed(0)
        args = self.parse(*flags)
        student = create_model('test_resnet', num_classes=3).eval()
        built = objective.build_task(args, student, loss.build_loss(args, Classes(3)), self.runtime(args))
        torch.manual_seed(1)
        return built(torch.rand(3, 3, 32, 32), torch.tensor([0, 2, 1]))['loss'].item()

    def task_arguments(self, *flags: str) -> Any:
        calls = [self.spy(objective, f'{kind}DistillationTask', lambda **_: None)
                 for kind in ('Logit', 'Feature', 'Token')]
        args = self.parse(*flags)
        objective.build_task(args, torch.nn.Identity(), torch.nn.Identity(), self.runtime(args))
        return calls

    def validation(self, *flags: str) -> Any:
        args = read_validate([
            '--device', 'cpu', '--data-dir', self.root, '--model', 'test_resnet', '--num-classes', '3', '-b', '2', '-j',
            '0', *flags])
        self.patch.setattr(model, 'create_model', lambda name, **kwargs: create_model(
            name, num_classes=kwargs['num_classes'], img_size=kwargs['img_size']))  # no pretrained weights
        calls = [self.spy(data, 'create_loader'), self.spy(subject, 'reparameterize_model'),
                 self.spy(torch.nn, 'DataParallel', lambda module, **_: module)]
        fusion = SimpleNamespace(memory_efficient_fusion=lambda module: module)
        self.patch.setitem(sys.modules, 'functorch.compile', fusion)
        calls.append(self.spy(fusion, 'memory_efficient_fusion', lambda module: module))
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO), contextlib.suppress(AssertionError, ImportError, ConfigError):
            calls.append([str(validate_run.validate(args)['images'])])
        return calls, sum(']  loss' in record.getMessage() for record in self.caplog.records)
