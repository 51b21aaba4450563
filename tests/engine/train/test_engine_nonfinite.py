"""Losses and gradients that are NaN or infinite never reach the weights."""
import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from loop_tools import make_batches, make_run
from resume_tools import break_off, rows, unequal

from cpool_vision.engine.distributed.vote import Vote
from cpool_vision.engine.train import loop as train_loop
from cpool_vision.engine.train.loop import train_one_epoch
from cpool_vision.engine.train.run import Run
from cpool_vision.errors import NonFiniteLossError

CPU = torch.device('cpu')
NAN, INF = float('nan'), float('inf')


def spoil_gradient(run: Run, calls: set[int], value: float) -> None:
    """Puts a value into the gradient at the given backward passes, counted from 1."""
    seen = [0]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return gradient + value if seen[0] in calls else gradient

    next(run.task.parameters()).register_hook(hook)


@pytest.mark.parametrize('bad', [NAN, INF])
def test_non_finite_loss_stops_before_the_update(bad: float) -> None:
    data = make_batches(6)
    data[3][0][0] = bad
    run = make_run(data, 2)
    clean = make_run(make_batches(6)[:2], 2)
    train_one_epoch(clean, 0)
    with pytest.raises(NonFiniteLossError, match=r'the loss.*epoch 0, update 1 of 3 \(batch 3.*--clip-grad') as caught:
        train_one_epoch(run, 0)
    assert isinstance(caught.value, FloatingPointError)
    assert len(run.optimizer.seen) == 1
    for mine, theirs in zip(run.task.parameters(), clean.task.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize('flags', [{}, {'clip_grad': 1.}], ids=['free', 'clipped'])
@pytest.mark.parametrize('bad', [NAN, INF, -INF])
def test_non_finite_gradient_stops_before_the_update(bad: float, flags: dict[str, Any]) -> None:
    run = make_run(make_batches(4), 2, **flags)
    spoil_gradient(run, {3}, bad)
    with pytest.raises(NonFiniteLossError, match=r'the gradient is not finite at epoch 0, update 1 of 2'):
        train_one_epoch(run, 0)
    assert len(run.optimizer.seen) == 1
    assert all(torch.isfinite(value).all() for value in run.task.parameters())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3))


def state_of(run: Run) -> list[torch.Tensor]:
    state: Any = run.task.state_dict()
    return [*state.values(), *[value for part in run.optimizer.state_dict()['state'].values()
                               for value in part.values() if value is not None]]


@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_a_skipped_update_leaves_no_trace(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    batches = make_batches(6)
    broken = copy.deepcopy(batches)
    run = make_run(broken, 2, model=net(), nonfinite='skip')
    if kind == 'loss':
        broken[2][0][0] = NAN
    else:
        spoil_gradient(run, {3}, NAN)
    run.task.setup_ema(decay=0.5)
    with caplog.at_level('WARNING'):
        metrics = train_one_epoch(run, 0)
    assert metrics['skipped'] == 1 and f'The {kind} is not finite' in caplog.text and '1 so far' in caplog.text

    reference = make_run(batches, 2, model=net(), nonfinite='skip')
    reference.task.setup_ema(decay=0.5)
    real = train_loop._judge

    def judge(each: Run, group: Any, step: int) -> Any:  # leaves the update out for no reason
        verdict, sound = real(each, group, step)
        return verdict, sound and step not in (2, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_loop, '_judge', judge)
        expected = train_one_epoch(reference, 0)
    assert len(run.optimizer.seen) == len(reference.optimizer.seen) == 2
    assert metrics['loss'] == expected['loss'] == expected['loss']
    for mine, theirs in zip(state_of(run), state_of(reference), strict=True):
        assert torch.equal(mine, theirs) and torch.isfinite(mine).all()


def test_too_many_skipped_updates_end_the_run() -> None:
    batches = make_batches(6)
    for index in (1, 3, 4):
        batches[index][0][0] = INF
    run = make_run(batches, 1, nonfinite='skip', max_skipped=3)
    assert train_one_epoch(run, 0)['skipped'] == 3
    with pytest.raises(NonFiniteLossError, match=r'after 3 skipped updates \(--max-skipped 3\) at epoch 1, update 1'):
        train_one_epoch(run, 1)


class Faulty(nn.Module):
    """Multiplies the gradient by a factor, in which no scaler can help if it is not finite."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.layer, self.factors = nn.Linear(12, 3), factors

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.layer(images.flatten(1))
        if self.factors:
            factor = self.factors.pop(0)
            out.register_hook(lambda gradient: gradient * factor)
        return out


def test_overflow_of_float16_is_left_to_the_scaler() -> None:
    run = make_run(make_batches(6), 1, model=Faulty([1., INF, 1., 1., 1., 1.]), amp_dtype=torch.float16)
    assert train_one_epoch(run, 0)['skipped'] == 0
    assert len(run.optimizer.seen) == 5 and run.loss_scaler.get_scale() == 2 ** 15


@pytest.mark.parametrize('policy', ['raise', 'skip'])
def test_what_the_scaler_cannot_help_is_not_left_to_it(policy: str) -> None:
    run = make_run(make_batches(24), 1, model=Faulty([NAN] * 24), amp_dtype=torch.float16, nonfinite=policy,
                   max_skipped=3)
    with pytest.raises(NonFiniteLossError, match='the gradient is not finite.*update (16|19) of 24'):
        train_one_epoch(run, 0)
    assert run.optimizer.seen == []


def test_a_non_finite_loss_is_skipped_under_a_scaler_too() -> None:
    batches = make_batches(6)
    batches[2][0][0] = NAN
    run = make_run(batches, 1, amp_dtype=torch.float16, nonfinite='skip', clip_grad=1.)
    assert train_one_epoch(run, 0)['skipped'] == 1
    assert len(run.optimizer.seen) == 5
    assert all(torch.isfinite(value).all() for value in run.task.parameters())


def test_large_gradients_in_half_precision_are_finite() -> None:
    verdict = Vote(CPU, False).take(torch.tensor(1.), [torch.full((1000,), 6e4, dtype=torch.float16)])
    assert verdict.gradient_finite and verdict.loss_finite and verdict.signal == 0


@pytest.mark.parametrize('size', [1, 3, 8, 17, 1000])
@pytest.mark.parametrize('bad', [NAN, INF, -INF])
def test_any_element_is_seen(size: int, bad: float) -> None:
    vote = Vote(CPU, False)
    for place in {0, size // 2, size - 1}:
        gradient = torch.ones(size)
        gradient[place] = bad
        assert not vote.take(None, [torch.ones(3), gradient.bfloat16(), torch.ones(2, 2)]).gradient_finite
        assert not vote.take(None, [gradient]).gradient_finite
    assert vote.take(None, [torch.ones(size)]).gradient_finite
    assert not vote.take(torch.tensor(bad)).loss_finite


@pytest.fixture
def nan_in_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes the loss of one batch of one epoch NaN."""
    def spoil(epoch: int, batch: int) -> None:
        real = train_loop._to_device

        def to_device(run: Run, image: torch.Tensor, target: torch.Tensor) -> Any:
            image, target = real(run, image, target)
            here = run.progress.epoch == epoch and run.progress.batch == batch
            return (image * NAN if here else image), target

        monkeypatch.setattr(train_loop, '_to_device', to_device)
    return spoil


def test_the_summary_counts_and_a_resumed_run_remembers(
        run_train: Callable[..., Any], load: Callable[..., Any], nan_in_batch: Callable[[int, int], None]) -> None:
    nan_in_batch(0, 2)
    flags = ['-b', '4', '--nonfinite', 'skip', '--max-skipped', '1', '--model-ema']
    whole = run_train(*flags, '--experiment', 'whole')
    assert [row['skipped_updates'] for row in whole['epochs']] == [1, 0]
    assert load(whole['folder'], 'last.pth.tar')['position']['skipped_before'] == 1
    flags += ['--experiment', 'broken', '--resume', 'auto', '--recovery-interval', '1']
    break_off(lambda: run_train(*flags), 4)
    again = run_train(*flags)
    assert unequal(load(whole['folder'], 'last.pth.tar'), load(again['folder'], 'last.pth.tar')) == []
    assert rows(whole['folder']) == rows(again['folder'])
    nan_in_batch(2, 0)
    with pytest.raises(NonFiniteLossError, match='after 1 skipped updates'):
        run_train(*flags, '--epochs', '3')


def test_without_the_policy_the_run_ends_and_its_checkpoints_stay(
        run_train: Callable[..., Any], load: Callable[..., Any], nan_in_batch: Callable[[int, int], None],
        tmp_path: Any) -> None:
    nan_in_batch(1, 0)
    with pytest.raises(NonFiniteLossError, match='epoch 1'):
        run_train('-b', '4', '--experiment', 'x')
    content = load(tmp_path, 'runs', 'x', 'last.pth.tar')
    assert content['epoch'] == 0 and 'skipped_updates' not in rows(os.path.join(tmp_path, 'runs', 'x'))[0]
