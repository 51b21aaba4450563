"""Gradient accumulation, and losses counted once."""
import pytest
import torch
import torch.nn as nn
from loop_tools import make_batches, make_run

from cpool_vision.engine.tracking.meter import LossMeter
from cpool_vision.engine.train.loop import train_one_epoch
from cpool_vision.engine.train.run import count_updates


@pytest.mark.parametrize('batches, accum', [(13, 8), (15, 8), (9, 5), (8, 4), (3, 8), (5, 1)])
def test_updates_are_the_ceiling_and_equal_one_big_batch_each(batches: int, accum: int) -> None:
    data = make_batches(batches)
    run = make_run(data, accum)
    train_one_epoch(run, 0)
    updates = -(-batches // accum)
    assert run.updates_per_epoch == count_updates(batches, accum) == updates
    assert len(run.optimizer.seen) == updates
    assert run.task.silent == batches - updates

    big = [tuple(torch.cat(parts) for parts in zip(*data[start:start + accum], strict=True))
           for start in range(0, batches, accum)]
    reference = make_run(big, 1)
    train_one_epoch(reference, 0)
    for mine, theirs in zip(run.optimizer.seen, reference.optimizer.seen, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_reported_loss_is_the_mean_over_images() -> None:
    data = [*make_batches(2, 4), *make_batches(1, 7)]
    run = make_run(data, 1, lr=0.)
    loss = train_one_epoch(run, 0)['loss']
    everything = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
    expected = nn.functional.cross_entropy(run.task.get_trainable_module()(everything[0]), everything[1])
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_meter_separates_the_epoch_from_the_last_report() -> None:
    meter = LossMeter(torch.device('cpu'))
    meter.add(torch.tensor(1.), 3)
    assert meter.read(False) == (1., 1.)
    meter.add(torch.tensor(5.), 1)
    assert meter.read(False) == (2., 5.)


def test_the_rehearsal_of_three_processes_leaves_no_trace(process_group: None) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 3))

    runs = [make_run(make_batches(5), 2, model=net(), world_size=world_size) for world_size in (1, 3)]
    calls = [0, 0]
    for index, run in enumerate(runs):
        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        run.task.register_forward_hook(count)
        for epoch in range(2):
            train_one_epoch(run, epoch)
    assert calls == [10, 11]
    one, two = (run.task.state_dict() for run in runs)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
