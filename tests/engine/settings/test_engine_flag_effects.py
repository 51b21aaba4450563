"""What each flag leads to: the model, its input, optimizer, loss and teacher, and the processes."""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from process_tools import in_processes
from timm.data import create_dataset
from timm.layers import DropPath, SplitBatchNorm2d, is_fast_norm, set_fast_norm
from timm.models import create_model
from timm.task import distillation
from torch.nn.parallel import DistributedDataParallel

from cpool_vision.engine import device, model
from cpool_vision.engine.data import dataset
from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.tracking.run_lock import RunLock
from cpool_vision.engine.train import loss, objective, validator
from cpool_vision.engine.train.build import build
from cpool_vision.engine.train.fit import train

CPU = torch.device('cpu')
LOGITS = torch.tensor([[2., 0.5, -1.], [0.3, 0.1, 0.2], [-2., 1., 0.]])
TARGET = torch.tensor([0, 2, 1])
HOT = nn.functional.one_hot(TARGET, 3).float()
SMOOTH = 0.9 * HOT + 0.1 / 3


def parse(*flags: str) -> TrainSettings:
    return read_train(['--device', 'cpu', '--num-classes', '3', '--model', 'test_resnet', '--img-size', '32', *flags])


def runtime_of(settings: TrainSettings, world_size: int = 1) -> device.Runtime:
    return device.Runtime(CPU, device.resolve_precision(settings, CPU), 0, world_size)


# the set

OPENED: dict[str, tuple[str, int, str]] = {  # flags, images, mode
    'data_dir': ('--data-dir ROOT', 24, 'RGB'),
    'dataset': ('--data-dir ROOT --dataset cpool/shapes --num-classes 10 --train-num-samples 20', 20, 'RGB'),
    'input_img_mode': ('--data-dir ROOT --input-img-mode L', 24, 'L'),
    'train_split': ('--data-dir ROOT --train-split validation', 7, 'RGB'),
    'train_num_samples': ('--dataset cpool/shapes --num-classes 10 --train-num-samples 30', 30, 'RGB'),
}


@pytest.mark.parametrize('flag', OPENED)
def test_set_of_images(image_root: str, flag: str) -> None:
    words, count, mode = OPENED[flag]
    settings = parse(*words.replace('ROOT', image_root).split())
    found = dataset.build_dataset(settings, Classes(settings.num_classes or 0), settings.train_split, True,
                                  settings.input_img_mode or 'RGB', settings.train_num_samples)
    assert (len(found), found[0][0].mode) == (count, mode)


def test_class_map_numbers_the_folders(image_root: str, tmp_path: Path) -> None:
    (tmp_path / 'map.txt').write_text('owl\ndog\ncat\n')
    for flags, first in (([], 0), (['--class-map', str(tmp_path / 'map.txt')], 2)):
        settings = parse('--data-dir', image_root, *flags)
        found = dataset.build_dataset(settings, Classes(3), 'train', True, 'RGB', None)
        assert found[0][1] == first and found.filename(0).startswith('cat')


def test_flags_of_sets_of_other_packages_reach_their_factory(image_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return create_dataset('', root=f'{image_root}/train')

    monkeypatch.setattr(dataset, 'create_dataset', create)
    settings = parse('--dataset', 'hfds/some/set', '--dataset-download', '--input-key', 'pixels', '--target-key',
                     'label', '--dataset-trust-remote-code', '--epoch-repeats', '2')
    dataset.build_dataset(settings, Classes(3), 'train', True, 'RGB', None)
    assert asked['download'] is True and asked['trust_remote_code'] is True
    assert (asked['input_key'], asked['target_key'], asked['repeats']) == ('pixels', 'label', 2)


# the model

def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [each for each in net.modules() if isinstance(each, nn.BatchNorm2d)]


def dropped(net: nn.Module) -> float:
    return max(each.drop_prob for each in net.modules() if isinstance(each, DropPath))


MODELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    'model': ('--model test_vit', lambda net: type(net).__name__ == 'VisionTransformer'),
    'num_classes': ('--num-classes 5', lambda net: net(torch.zeros(1, 3, 32, 32)).shape == (1, 5)),
    'gp': ('--gp max', lambda net: net.global_pool.pool_type == 'max'),
    'in_chans': ('--in-chans 1', lambda net: net(torch.zeros(1, 1, 32, 32)).shape == (1, 3)),
    'input_size': ('--input-size 1 32 32', lambda net: net(torch.zeros(1, 1, 32, 32)).shape == (1, 3)),
    'model_kwargs': ('--model test_vit --model-kwargs depth=2', lambda net: len(net.blocks) == 2),
    'head_init_bias': ('--head-init-bias 0.5', lambda net: net.fc.bias.tolist() == [0.5] * 3),
    'drop': ('--drop 0.3', lambda net: net.drop_rate == 0.3),
    'drop_path': ('--drop-path 0.3', lambda net: dropped(net) == pytest.approx(0.3)),
    'drop_connect': ('--drop-connect 0.2', lambda net: dropped(net) == pytest.approx(0.2)),
    'drop_block': ('--drop-block 0.3', lambda net: 'drop_prob=0.3' in repr(net) or any(
        getattr(each, 'drop_prob', 0) == 0.3 for each in net.modules())),
    'bn_momentum': ('--model test_efficientnet --bn-momentum 0.3', lambda net: {
        each.momentum for each in norms(net)} == {0.3}),
    'bn_eps': ('--model test_efficientnet --bn-eps 0.01', lambda net: {each.eps for each in norms(net)} == {0.01}),
    'torchscript': ('--torchscript', lambda net: isinstance(net, torch.jit.ScriptModule)),
    'grad_checkpointing': ('--grad-checkpointing', lambda net: net.grad_checkpointing is True),
    'split_bn': ('--aug-splits 2 --split-bn', lambda net: all(
        isinstance(each, SplitBatchNorm2d) and len(each.aux_bn) == 1 for each in net.modules()
        if isinstance(each, nn.BatchNorm2d) and hasattr(each, 'aux_bn')) and any(
            isinstance(each, SplitBatchNorm2d) for each in net.modules())),
    'channels_last': ('--channels-last', lambda net: net.conv1[0].weight.is_contiguous(
        memory_format=torch.channels_last)),
    'model_dtype': ('--model-dtype bfloat16', lambda net: {each.dtype for each in net.parameters()} == {
        torch.bfloat16}),
}


def made(*flags: str) -> Any:
    settings = parse(*flags)
    torch.manual_seed(0)
    return model.place_model(model.create_train_model(settings), settings, runtime_of(settings)).eval()


@pytest.mark.parametrize('flag', MODELS)
def test_model(flag: str) -> None:
    words, fits = MODELS[flag]
    assert fits(made(*words.split()))


def test_the_classifier_is_scaled() -> None:
    assert torch.equal(made('--head-init-scale', '0.5').fc.weight, made().fc.weight / 2)


@pytest.mark.parametrize('flags, loaded', [
    ('--initial-checkpoint FILE', True), ('--pretrained --pretrained-path FILE', True),
    ('--pretrained-path FILE', False)])
def test_weights_to_start_from(tmp_path: Path, flags: str, loaded: bool) -> None:
    torch.manual_seed(9)
    weights = create_model('test_resnet', num_classes=3).state_dict()
    torch.save(weights, tmp_path / 'weights.pth')
    net = made(*flags.replace('FILE', str(tmp_path / 'weights.pth')).split())
    assert torch.equal(net.conv1[0].weight, weights['conv1.0.weight']) is loaded


INPUTS: dict[str, tuple[str, Any]] = {
    'img_size': ('--img-size 48', {'input_size': (3, 48, 48)}),
    'crop_pct': ('--crop-pct 0.5', {'crop_pct': 0.5}),
    'mean': ('--mean 0.1 0.2 0.3', {'mean': (0.1, 0.2, 0.3)}),
    'std': ('--std 0.1 0.2 0.3', {'std': (0.1, 0.2, 0.3)}),
    'interpolation': ('--interpolation nearest', {'interpolation': 'nearest'}),
}


@pytest.mark.parametrize('flag', INPUTS)
def test_input(flag: str) -> None:
    words, expected = INPUTS[flag]
    found = model.resolve_input(create_model('test_resnet'), parse(*words.split()))
    assert {name: tuple(found[name]) if isinstance(found[name], list) else found[name] for name in expected} == expected


# device and processes

def test_precision() -> None:
    for flags, dtype in (('', None), ('--amp', torch.float16), ('--amp --amp-dtype bfloat16', torch.bfloat16)):
        assert device.resolve_precision(parse(*flags.split()), CPU).amp_dtype is dtype


def test_arithmetic_of_the_whole_process() -> None:
    device.start_runtime(parse('--fast-norm', '--fuser', 'te', '--deterministic'), join=False)
    try:
        assert is_fast_norm() and torch.are_deterministic_algorithms_enabled() and torch._C._jit_texpr_fuser_enabled()
    finally:
        set_fast_norm(False)
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_model_is_compiled_by_the_backend_and_in_the_mode_asked_for(base_flags: list[str]) -> None:
    modes: list[Any] = []

    def note(graph: Any, inputs: Any, mode: str | None = None) -> Any:
        modes.append(mode)
        return graph.forward

    torch._dynamo.register_backend(note, name='noting')
    train(read_train([*base_flags, '--epochs', '1', '--model-ema', '--torchcompile', 'noting',
                      '--torchcompile-mode', 'reduce-overhead']))
    assert modes and set(modes) == {'reduce-overhead'}


@pytest.mark.parametrize('flags, buffers', [([], True), (['--no-ddp-bb'], False)])
def test_buffers_of_several_processes(process_group: None, base_flags: list[str], flags: list[str], buffers: bool,
                                      ) -> None:
    settings = read_train([*base_flags, '--val-split', '', *flags])
    with RunLock() as lock:
        run = build(settings, runtime_of(settings, 2), lock)
    run.trackers.close(False)
    net: Any = run.task.get_trainable_module()
    assert isinstance(net, DistributedDataParallel) and net.broadcast_buffers is buffers


def test_batch_norm_over_several_processes() -> None:
    settings = parse('--sync-bn')
    for world_size, count in ((1, 0), (2, len(norms(made())))):
        net = model.place_model(model.create_train_model(settings), settings, runtime_of(settings, world_size))
        assert sum(isinstance(each, nn.SyncBatchNorm) for each in net.modules()) == count


def statistics_of(modes: list[str], rank: int) -> list[float]:
    means = []
    for mode in modes:
        net = nn.BatchNorm2d(1)
        net.running_mean.fill_(rank)  # type: ignore[union-attr]
        settings = parse('--dist-bn', mode)
        validator.average_statistics(settings, runtime_of(settings, 2), net)
        means.append(float(net.running_mean))  # type: ignore[arg-type]
    return means


def test_statistics_of_several_processes(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, partial(statistics_of, ['reduce', 'broadcast', '']))
    assert found == [[0.5, 0., 0.], [0.5, 0., 1.]]


# optimizer

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    'opt': ('--opt adamw', {'betas': (0.9, 0.999)}),
    'opt_eps': ('--opt adamw --opt-eps 0.1', {'eps': 0.1}),
    'opt_betas': ('--opt adamw --opt-betas 0.1 0.2', {'betas': (0.1, 0.2)}),
    'momentum': ('--momentum 0.3', {'momentum': 0.3}),
    'weight_decay': ('--weight-decay 0.3', {'weight_decay': 0.3}),
    'opt_kwargs': ('--opt-kwargs maximize=True', {'maximize': True}),
}


def optimizer_of(*flags: str) -> torch.optim.Optimizer:
    settings = parse('--lr', '0.1', *flags)
    return objective.build_optimizer(settings, create_model('test_resnet'), objective.resolve_lr(settings))


@pytest.mark.parametrize('flag', OPTIMIZERS)
def test_optimizer(flag: str) -> None:
    words, expected = OPTIMIZERS[flag]
    group = optimizer_of(*words.split()).param_groups[-1]
    assert {name: tuple(group[name]) if isinstance(group[name], list) else group[name]
            for name in expected} == expected


def test_rates_of_layers() -> None:
    def scales(*flags: str) -> list[float]:
        return sorted({group['lr_scale'] for group in optimizer_of('--layer-decay', '0.5', *flags).param_groups})

    assert scales()[-3:] == [0.25, 0.5, 1.]
    assert scales('--layer-decay-min-scale', '0.4') == [0.4, 0.5, 1.]
    assert scales('--layer-decay-no-opt-scale', '0.3') == [0.5, 1.]


# loss and teacher

def bce(target: torch.Tensor, **kwargs: Any) -> float:
    return float(nn.functional.binary_cross_entropy_with_logits(LOGITS, target, **kwargs))


LOSSES: dict[str, tuple[str, Callable[[], float]]] = {
    'smoothing': ('--smoothing 0.4', lambda: float(nn.functional.cross_entropy(LOGITS, TARGET, label_smoothing=0.4))),
    'bce_loss': ('--bce-loss', lambda: bce(SMOOTH)),
    'bce_sum': ('--bce-loss --bce-sum', lambda: 3 * bce(SMOOTH)),
    'bce_target_thresh': ('--bce-loss --bce-target-thresh 0.2', lambda: bce(HOT)),
    'bce_pos_weight': ('--bce-loss --bce-pos-weight 3', lambda: bce(SMOOTH, pos_weight=torch.tensor(3.))),
    'loss_type': ('--loss-type bce --smoothing 0', lambda: bce(HOT)),
    # labels that mixup has smoothed are not smoothed again
    'mixup': ('--mixup 1', lambda: float(nn.functional.cross_entropy(LOGITS, HOT))),
    'mixup and bce': ('--mixup 1 --bce-loss', lambda: bce(HOT)),
}


@pytest.mark.parametrize('flag', LOSSES)
def test_loss(flag: str) -> None:
    words, expected = LOSSES[flag]
    target = HOT if 'mixup' in flag else TARGET
    assert loss.build_loss(parse(*words.split()), Classes(3))(LOGITS, target).item() == pytest.approx(expected())


def test_divergence_of_splits() -> None:
    """Alike in all splits, only cross-entropy is left, of the first split."""
    criterion = loss.build_loss(parse('--aug-splits', '3', '--jsd-loss', '--smoothing', '0'), Classes(3))
    alike, other = LOGITS.repeat(3, 1), torch.cat([LOGITS, LOGITS, -LOGITS])
    plain = float(nn.functional.cross_entropy(LOGITS, TARGET))
    assert float(criterion(alike, TARGET.repeat(3))) == pytest.approx(plain, rel=1e-4)
    assert float(criterion(other, TARGET.repeat(3))) > plain + 1


@pytest.fixture
def distil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the task that distils from a fresh teacher."""
    monkeypatch.setattr(distillation, 'create_model', lambda **kw: create_model(**{**kw, 'pretrained': False}))

    def make(*flags: str, student: str = 'test_resnet', **kwargs: Any) -> Any:
        torch.manual_seed(0)
        settings = parse('--kd-model-name', 'test_resnet', *flags)
        net = create_model(student, num_classes=3, **kwargs).eval()
        return objective.build_task(settings, net, loss.build_loss(settings, Classes(3)), runtime_of(settings))

    return make


def test_weights_of_distillation(distil: Callable[..., Any]) -> None:
    image = torch.rand(3, 3, 32, 32)
    for flags, mine, teachers in (('', 1, 1), ('--distill-loss-weight 3', 1, 3), ('--task-loss-weight 0.2', 0.2, 0.8)):
        parts = distil(*flags.split())(image, TARGET)
        assert parts['loss'].item() == pytest.approx(float(mine * parts['task_loss'] + teachers * parts['kd_loss']))


def test_temperature_of_distillation(distil: Callable[..., Any]) -> None:
    image, task = torch.rand(3, 3, 32, 32), distil('--kd-temperature', '2')
    mine, teachers = task.trainable_module(image) / 2, task.teacher(image) / 2
    divergence = nn.functional.kl_div(mine.log_softmax(1), teachers.log_softmax(1), reduction='batchmean',
                                      log_target=True)
    assert task(image, TARGET)['kd_loss'].item() == pytest.approx(4 * float(divergence), rel=1e-4)


def test_what_is_learned_from_the_teacher(distil: Callable[..., Any]) -> None:
    assert isinstance(distil(), distillation.LogitDistillationTask)
    assert isinstance(distil('--kd-distill-type', 'feature'), distillation.FeatureDistillationTask)
    wide = distil('--kd-distill-type', 'feature', '--kd-student-feature-dim', '7', '--kd-teacher-feature-dim', '9')
    assert wide.trainable_module.projection.weight.shape == (9, 7)


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_token_distillation(distil: Callable[..., Any], kind: str) -> None:
    task = distil('--kd-distill-type', 'token', '--kd-token-distill-type', kind, '--kd-temperature', '1',
                  student='deit_tiny_distilled_patch16_224', img_size=32, embed_dim=24, depth=1, num_heads=2)
    image = torch.rand(3, 3, 32, 32)
    task.train()
    parts = task(image, TARGET)
    _, token = task.trainable_module(image)
    teachers = task.teacher(task.teacher.normalize_input(image, task.student_mean, task.student_std))
    expected = nn.functional.cross_entropy(token, teachers.argmax(1)) if kind == 'hard' else nn.functional.kl_div(
        token.log_softmax(1), teachers.log_softmax(1), reduction='batchmean', log_target=True)
    assert parts['distill_loss'].item() == pytest.approx(expected.item(), rel=1e-4)
