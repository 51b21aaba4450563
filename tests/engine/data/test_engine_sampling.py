"""Order of the training images: property of each epoch, agreement with timm's samplers, positions."""
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.scheduled_sampler import ScheduledBatchSampler

from cpool_vision.engine.data import sampling
from cpool_vision.engine.data.sampling import BatchKey, BatchKeys, EpochOrder, keyed_permutation, keyed_seeds
from cpool_vision.errors import ConfigError


class Sized:
    """What timm's samplers want of a dataset."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def images(keys: list[BatchKey]) -> list[int]:
    return [index for key in keys for index in key.indices]


def batches(size: int, batch_size: int, epoch: int = 0, first: int = 0, schedule: Any = None, **kwargs: Any,
            ) -> list[BatchKey]:
    keys = BatchKeys(EpochOrder(size, kwargs.pop('seed', 5), **kwargs), batch_size, schedule)
    keys.start_at(epoch, first)
    return list(keys)


@pytest.mark.parametrize('size, world_size', [(24, 1), (24, 2), (25, 2), (1000, 3), (7, 4), (3, 4)])
def test_each_image_comes_once_per_epoch(size: int, world_size: int) -> None:
    for epoch in (0, 1, 7):
        shares = [EpochOrder(size, 5, rank, world_size).draw(epoch)[0].tolist() for rank in range(world_size)]
        count = Counter(index for share in shares for index in share)
        assert set(count) == set(range(size))
        # processes are made equally long by taking the first images again, as in torch's DistributedSampler
        padding = -size % world_size
        assert sum(count.values()) == size + padding and sum(n - 1 for n in count.values()) == padding
        assert len({len(share) for share in shares}) == 1


def test_two_processes_share_an_epoch_without_overlap() -> None:
    one, two = (set(images(batches(26, 4, rank=rank, world_size=2))) for rank in (0, 1))
    assert len(one) == len(two) == 12 and not one & two


@pytest.mark.parametrize('size, batch_size, world_size', [(24, 8, 1), (25, 8, 1), (25, 13, 2), (25, 12, 2), (7, 4, 2)])
def test_length_is_that_of_timm(size: int, batch_size: int, world_size: int) -> None:
    sampler = torch.utils.data.DistributedSampler(Sized(size), world_size, 0)  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader(Sized(size), batch_size, sampler=sampler, drop_last=True)  # type: ignore
    keys = batches(size, batch_size, world_size=world_size)
    assert len(keys) == len(loader) == len(BatchKeys(EpochOrder(size, 0, 0, world_size), batch_size))
    assert all(len(key.indices) == batch_size for key in keys)


def test_seed_epoch_and_rank_matter_and_nothing_else_does() -> None:
    here = batches(40, 4, 3, world_size=2)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert batches(40, 4, 3, world_size=2) == here
    others = [batches(40, 4, 4, world_size=2), batches(40, 4, 3, world_size=2, rank=1),
              batches(40, 4, 3, world_size=2, seed=6)]
    for other in others:
        assert [key.indices for key in other] != [key.indices for key in here]
    orders = [tuple(EpochOrder(40, seed).draw(epoch)[0]) for seed, epoch in product(range(20), range(20))]
    assert len(set(orders)) == 400


def test_permutations_are_uniform() -> None:
    count = Counter(tuple(keyed_permutation(sampling.ORDER, 3, epoch, 4)) for epoch in range(4800))
    assert len(count) == 24
    assert sum((n - 200) ** 2 / 200 for n in count.values()) < 49.7  # chi-squared, 23 degrees: p = 0.001


def mix(x: int) -> int:
    """SplitMix64's finalizer on a plain integer."""
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def test_permutation_is_the_same_everywhere() -> None:
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def draw(seed: int, stream: int, index: int) -> int:
        salt = mix(mix(seed + golden & mask) ^ stream)
        return mix(mix(salt + golden * (index + 1) & mask) + golden & mask)

    base = draw(42, sampling.ORDER, 3)
    expected = sorted(range(10), key=lambda index: draw(base, 1, index))
    assert keyed_permutation(sampling.ORDER, 42, 3, 10).tolist() == expected
    assert expected == [0, 4, 6, 2, 9, 7, 1, 5, 3, 8]


def test_seeds_do_not_collide() -> None:
    seeds = [value for stream, seed, epoch in product(range(3), range(3), range(3))
             for copy in (0, 1) for value in keyed_seeds(stream, seed, epoch, range(500), copy)]
    assert len(set(seeds)) == len(seeds) == 27_000
    assert 0 <= min(seeds) and max(seeds) < 1 << 63
    assert abs(np.mean([seed & 1 for seed in seeds]) - 0.5) < 0.02


@pytest.mark.parametrize('first', [0, 1, 5, 6])
def test_a_position_gives_the_tail(first: int) -> None:
    whole = batches(26, 4, 2)
    assert [key.batch for key in whole] == list(range(6))
    assert batches(26, 4, 2, first) == whole[first:]


def test_iterating_does_not_move_the_position() -> None:
    keys = BatchKeys(EpochOrder(26, 5), 4)
    keys.start_at(1, 4)
    assert list(keys) == list(keys) and len(list(keys)) == 2 and len(keys) == 6
    begun = iter(keys)
    keys.start_at(0, 0)
    assert next(begun).epoch == 1


@pytest.mark.parametrize('epoch, batch', [(-1, 0), (0, -1), (0, 7)])
def test_positions_outside_are_refused(epoch: int, batch: int) -> None:
    with pytest.raises(ConfigError, match=f'no batch {batch} in epoch {epoch}: an epoch has 6 batches'):
        BatchKeys(EpochOrder(26, 5), 4).start_at(epoch, batch)


@pytest.mark.parametrize('size, world_size, repeats', [
    (24, 2, 3), (24, 2, 3.), (25, 3, 2), (600, 4, 3), (600, 2, 1.5), (250, 3, 2.5), (10, 4, 1.1)])
def test_repeated_augmentation_takes_the_images_of_timm(
        size: int, world_size: int, repeats: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, 'keyed_permutation', lambda stream, seed, epoch, size: np.arange(size))
    for rank in range(world_size):
        order = EpochOrder(size, 5, rank, world_size, repeats)
        timm = RepeatAugSampler(Sized(size), world_size, rank, shuffle=False, num_repeats=repeats)
        assert order.draw(0)[0].tolist() == list(timm) and len(order) == len(timm)


def test_copies_of_an_image_are_told_apart() -> None:
    drawn = [EpochOrder(24, 5, rank, 2, 3.).draw(0) for rank in (0, 1)]
    pairs = [(index, copy) for indices, copies in drawn for index, copy in zip(indices, copies, strict=True)]
    assert len(set(pairs)) == len(pairs) == 24
    assert Counter(copy for _, copy in pairs) == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize('options', [
    {},
    {'choice_weights': [0.2, 0.3, 0.5]},
    {'num_batches': 9},
    {'num_batches': 40},
    {'choice_schedule': 'progressive', 'schedule_epochs': 4},
], ids=['budget', 'weighted', 'short', 'twice', 'progressive'])
def test_batches_of_several_sizes(options: dict[str, Any]) -> None:
    def schedule() -> ScheduledBatchSampler:
        return ScheduledBatchSampler(range(50), [8, 4, 2], seed=5, **options)  # type: ignore[arg-type]

    keys = BatchKeys(EpochOrder(50, 5), 8, schedule())
    plans = []
    for epoch in (0, 1, 3):
        keys.start_at(epoch)
        whole = list(keys)
        assert len(whole) == len(keys)
        assert all(len(key.indices) == [8, 4, 2][key.choice or 0] for key in whole)
        expected = schedule()
        expected.set_epoch(epoch)
        assert Counter((key.choice, len(key.indices)) for key in whole) == Counter(expected.schedule)
        # an image that comes again is another copy of it
        pairs = [pair for key in whole for pair in zip(key.indices, key.repeats, strict=True)]
        assert len(set(pairs)) == len(pairs)
        plans.append([key.choice for key in whole])
        for first in (1, 4, len(keys)):
            assert batches(50, 8, epoch, first, schedule()) == whole[first:]
        # other processes have other images in batches of the same sizes
        other = batches(100, 8, epoch, 0, schedule(), rank=1, world_size=2)
        assert [key.choice for key in other] == plans[-1]
    assert plans[0] != plans[1]
    assert keys.average_batch_size == schedule().average_batch_size
