"""Models divided among processes: the same training, and checkpoints of whole tensors."""
import pathlib
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
from loop_tools import make_batches, make_run
from process_tools import in_processes, torchrun
from resume_tools import unequal
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.kill_test import Run, compare_runs, run_killed
from cpool_vision.engine.checkpoints.saver import TrainState
from cpool_vision.engine.distributed import sharding
from cpool_vision.engine.settings.train import EmaSettings
from cpool_vision.engine.train.loop import train_one_epoch
from cpool_vision.errors import ConfigError

FLAGS = [
    '--model', 'vit_micro_cpool_patch4_32', '--model-kwargs', 'depth=2', '--dataset', 'cpool/shapes', '--num-classes',
    '10', '--train-num-samples', '96', '--val-num-samples', '15', '-b', '4', '-j', '1', '--grad-accum-steps', '3',
    '--epochs', '3', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3', '--drop', '0.1', '--model-ema',
    '--model-ema-decay', '0.9', '--device', 'cpu', '--recovery-interval', '1', '--no-tensorboard']


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.linear(x)).relu()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Sequential(TinyBlock(), TinyBlock()), nn.Dropout(0.2), nn.Linear(12, 3))


def prepare(fsdp: bool, batches: int = 7, **flags: Any) -> tuple[Any, TrainState]:
    """A run of `tiny` with an average, and what is saved of it."""
    run: Any = make_run(make_batches(batches), 3, model=tiny(), **flags)
    average = EmaSettings(model_ema=True, model_ema_decay=0.9)
    if fsdp:
        sharding.shard_task(run.task, average, torch.device('cpu'))
    else:
        run.task.setup_ema(decay=0.9)
    run.optimizer = torch.optim.AdamW(run.task.get_trainable_module().parameters(), lr=0.1)
    return run, TrainState(run.task, run.optimizer, run.loss_scaler, None, {'model': 'tiny'})


def content_of(state: TrainState) -> dict[str, Any]:
    state.gather(keep=True)
    return state.to_checkpoint(0)


def test_divided_training_equals_whole_training(process_group: None) -> None:
    contents = []
    for fsdp in (False, True):
        run, state = prepare(fsdp)
        divided = any(isinstance(each, sharding.DTensor) for each in run.task.get_trainable_module().parameters())
        assert divided is fsdp
        for epoch in range(2):
            train_one_epoch(run, epoch)
        contents.append(content_of(state))
    assert unequal(*contents) == [] and len(contents[0]['state_dict_ema']) > 10
    assert not any(isinstance(value, sharding.DTensor) for value in contents[1]['state_dict'].values())


def test_a_run_may_begin_with_a_validation(process_group: None) -> None:
    """As one that is resumed after the last batch of an epoch does."""
    contents = []
    for validated in (False, True):
        run, state = prepare(True)
        if validated:
            for ema in (False, True):
                with torch.inference_mode():
                    run.task.get_eval_model(ema=ema).eval()(make_batches(1)[0][0])
        train_one_epoch(run, 0)
        contents.append(content_of(state))
    assert unequal(*contents) == []


@pytest.mark.parametrize('before, after', [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_on_with_and_without(process_group: None, tmp_path: pathlib.Path, before: bool, after: bool,
                                               ) -> None:
    run, state = prepare(before)
    train_one_epoch(run, 0)
    torch.save(content_of(state), tmp_path / 'a.pth.tar')
    train_one_epoch(run, 1)
    whole = content_of(state)

    content = torch.load(tmp_path / 'a.pth.tar', weights_only=True)
    again, other = prepare(after)
    nn.init.zeros_(again.task.get_trainable_module()[3].weight)  # what must come from the file
    assert other.load_checkpoint(content, 'a') == 1
    other.load_ema(content, 'a')
    train_one_epoch(again, 1)
    assert unequal(whole, content_of(other)) == []
    content['optimizer']['state'][0]['exp_avg'] += 1
    wrong, third = prepare(after)
    third.load_checkpoint(content, 'a')
    third.load_ema(content, 'a')
    train_one_epoch(wrong, 1)
    assert unequal(whole, content_of(third)) != []  # control: the state of the optimizer matters


ENTRIES = ('optimizer', 'state_dict', 'state_dict_ema')


def save(path: pathlib.Path, rank: int) -> int:
    """Exchanges of gradients in an epoch."""
    run, state = prepare(True, world_size=2, rank=rank)
    with CommDebugMode() as exchanged:
        train_one_epoch(run, 0)
    state.gather(keep=rank == 0)
    if rank == 0:
        torch.save(state.to_checkpoint(0), path)
    return sum(count for name, count in exchanged.get_comm_counts().items() if 'reduce_scatter' in str(name))


def load(path: pathlib.Path, rank: int) -> list[str]:
    """Entries that differ after loading."""
    _, state = prepare(True)
    content = torch.load(path, weights_only=True)
    fresh = content_of(state)
    assert state.load_checkpoint(content, str(path)) == 1
    state.load_ema(content, str(path))
    now = content_of(state)
    wanted = {name: content[name] for name in ENTRIES}
    assert unequal({name: fresh[name] for name in ENTRIES}, wanted) != []  # control
    return unequal({name: now[name] for name in ENTRIES}, wanted)


def test_any_number_of_processes_loads_what_two_wrote(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'a.pth.tar'
    # of two blocks and the rest, for each of three updates of seven batches
    assert in_processes(2, tmp_path, partial(save, path)) == [3 * 3] * 2
    for count in (1, 3):
        assert in_processes(count, tmp_path, partial(load, path)) == [[]] * count


def test_the_blocks_of_models_are_found() -> None:
    import timm
    for name, count in (('resnet50_cpool', 16), ('vit_small_cpool_patch16_224', 12), ('convnext_tiny_cpool', 18)):
        with torch.device('meta'):
            model = timm.create_model(name)
        blocks = sharding._blocks(model)
        inside, all_of_it = (sum(each.numel() for part in parts for each in part.parameters())
                             for parts in (blocks, [model]))
        assert len(blocks) == count and inside / all_of_it > 0.75, name


@pytest.mark.parametrize('flags, words', [
    ([], 'start them with torchrun'),
    (['--torchcompile', 'eager'], '--torchcompile'),
    (['--naflex-loader'], '--naflex-loader'),
    (['--kd-model-name', 'resnet18'], '--kd-model-name'),
    (['--model-ema-force-cpu'], '--model-ema-force-cpu'),
    (['--amp'], '--amp-dtype float16'),
    (['--clip-grad', '1', '--clip-mode', 'agc'], '--clip-mode agc'),
    (['--dataset', 'wds/x'], '--dataset wds/x'),
    (['--opt', 'lamb'], '--opt lamb.*choose adam'),
])
def test_what_cannot_be_divided_is_an_error(train_args: Callable[..., Any], flags: list[str], words: str,
                                            ) -> None:
    with pytest.raises(ConfigError, match=words):
        sharding.check_fsdp(train_args('--fsdp', *flags), bool(flags))
    sharding.check_fsdp(train_args(*flags), bool(flags))
    fine = train_args('--fsdp', '--amp', '--amp-dtype', 'bfloat16', '--clip-grad', '1', '--opt', 'adamw')
    sharding.check_fsdp(fine, True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes under DDP."""
    run = Run(tmp_path_factory.mktemp('whole'), 'whole', FLAGS, 2)
    run.finish()
    return run


@pytest.mark.slow
def test_two_processes_end_as_under_ddp_also_when_killed(whole: Run, tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, 'divided', [*FLAGS, '--fsdp'], 2)
    assert len(run_killed(run, 2, whole.seconds(), random.Random(1))) == 2  # noqa: S311
    assert compare_runs(whole.folder, run.folder) == []


SHARE = """
import sys
import torch.distributed as dist
from cpool_vision.cli import train
from cpool_vision.engine.distributed import sharding
from cpool_vision.engine.train import build as train_build

real = train_build.shard_task

def shard_task(task, *args):
    whole = sum(each.numel() for each in task.get_trainable_module().parameters())
    real(task, *args)
    mine = sum(sharding.local_part(each).numel() for each in task.get_trainable_module().parameters())
    print(f'share {mine / whole:.3f}', flush=True)

train_build.shard_task = shard_task
sys.exit(train.main())
"""


@pytest.mark.slow
def test_each_of_three_processes_holds_a_third(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'share.py').write_text(SHARE)
    done = torchrun(3, str(tmp_path / 'share.py'), *FLAGS, '--epochs', '1', '--clip-grad', '1', '--fsdp',
                    '--output', str(tmp_path))
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in re.findall(r'share (\d\.\d*)', done.stdout)]  # lines of processes may mix
    assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=0.01) and max(shares) < 0.4
