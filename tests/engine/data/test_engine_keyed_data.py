"""Training batches: the same bits for any number of workers and from any position, whatever was drawn before."""
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from loader_tools import CASES, Build, check_workers_and_positions, same, states
from timm.data import FastCollateMixup
from timm.data.random_erasing import RandomErasing

from cpool_vision.data.augment import Augmentation
from cpool_vision.engine.data import keyed
from cpool_vision.engine.data import loaders as data
from cpool_vision.errors import ConfigError


@pytest.mark.parametrize('name', CASES)
def test_batches_depend_on_seed_epoch_and_position_only(build: Build, name: str) -> None:
    check_workers_and_positions(build, CASES[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 4])
@pytest.mark.parametrize('name', CASES)
def test_batches_with_other_numbers_of_workers(build: Build, name: str, workers: int) -> None:
    check_workers_and_positions(build, CASES[name], workers)


@pytest.mark.parametrize('name, broken', [
    ('plain', 'samples'), ('unfetched', 'mixing'), ('randaugment', 'erasing'), ('albumentations', 'pipeline')])
def test_the_comparison_sees_what_is_not_keyed(
        build: Build, name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == 'samples':  # drawn from the generators of whichever process makes the sample
        monkeypatch.setattr(keyed.KeyedDataset, '_make', lambda self, index, seed, choice: self.dataset[
            index if choice is None else (index, choice)])
    elif broken == 'pipeline':
        monkeypatch.setattr(Augmentation, 'set_random_seed', lambda self, seed: None)
    else:  # drawn from what the last batch left behind
        stream = {'mixing': keyed.MIXING, 'erasing': keyed.ERASING}[broken]
        real, drawn = keyed.keyed_seeds, random.Random(0)  # noqa: S311
        monkeypatch.setattr(keyed, 'keyed_seeds', lambda kind, *keys: [
            drawn.getrandbits(63)] if kind == stream else real(kind, *keys))
    with pytest.raises(AssertionError):
        check_workers_and_positions(build, CASES[name], 2)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', ['randaugment', 'mixed', 'unfetched'])
def test_generators_of_the_process_are_left_alone(build: Build, name: str, workers: int) -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    prepared = build(*CASES[name], workers=workers)
    before = states()
    prepared.take(0)
    assert states() == before


@pytest.mark.parametrize('name', ['randaugment', 'mixed', 'unfetched', 'sizes'])
def test_seeds_and_processes_draw_differently(build: Build, name: str) -> None:
    here = build(*CASES[name]).take(0)
    assert not same(build(*CASES[name], '--seed', '7').take(0), here)
    first, second = (build(*CASES[name], rank=rank, world_size=2).take(0) for rank in (0, 1))
    assert not any(same([a], [b]) for a in first for b in second)


class Place:
    """Stands for a stream."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.current = epoch, batch


def collate(seed: int, rank: int, epoch: int, batch: int) -> bytes:
    samples = [(np.full((3, 8, 8), 10 * label, np.uint8), label) for label in range(4)]
    mixed = keyed.KeyedCollate(FastCollateMixup(mixup_alpha=1., num_classes=4), seed, rank)(
        keyed.KeyedSamples(samples, keyed.Report(epoch, batch)))
    return mixed[1].numpy().tobytes()


def mix(seed: int, rank: int, epoch: int, batch: int) -> bytes:
    mixup = keyed.KeyedMixup(Place(epoch, batch), seed, rank, mixup_alpha=1., num_classes=4)
    return mixup(torch.zeros(4, 3, 8, 8), torch.arange(4))[1].numpy().tobytes()


def erase(seed: int, rank: int, epoch: int, batch: int) -> bytes:
    erasing = RandomErasing(1., mode='pixel', device='cpu')
    return keyed.KeyedErasing(erasing, Place(epoch, batch), seed, rank, torch.device('cpu'))(
        torch.zeros(4, 3, 8, 8)).numpy().tobytes()


@pytest.mark.parametrize('draw', [collate, mix, erase])
def test_draws_of_a_batch_depend_on_seed_process_epoch_and_batch(draw: Callable[..., bytes]) -> None:
    keys = list(itertools.product((1, 2), (0, 1), (0, 1), (0, 1)))
    drawn = [draw(*key) for key in keys]
    assert len(set(drawn)) == len(keys)
    random.seed(9)
    assert [draw(*key) for key in keys] == drawn


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('place', ['cuda', 'cuda:0'])
def test_erasing_on_cuda_is_keyed(place: str) -> None:
    device = torch.device(place)
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state(device)
    erasing = RandomErasing(1., mode='pixel', device=place)
    one, two, other = (keyed.KeyedErasing(erasing, Place(0, batch), 5, 0, device)(
        torch.zeros(4, 3, 8, 8, device=device)) for batch in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.cuda.get_rng_state(device), before)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_stream_tells_which_batch_it_gave(build: Build, workers: int) -> None:
    loader = build('--no-prefetcher', workers=workers).loader
    data.start_at(loader, 3, 2)
    assert [loader.current for _ in loader] == [(3, batch) for batch in range(2, 6)]


def test_two_processes_see_each_image_once(build: Build) -> None:
    pictures = [image.numpy().tobytes() for image, _ in (
        (row, None) for batch, _ in build('--no-aug').take(0) for row in batch)]
    assert len(set(pictures)) == 24
    shares = [{row.numpy().tobytes() for batch, _ in build('--no-aug', rank=rank, world_size=2).take(0)
               for row in batch} for rank in (0, 1)]
    assert not shares[0] & shares[1] and shares[0] | shares[1] == set(pictures)


@pytest.mark.parametrize('workers', [0, 2])
def test_repeated_augmentation(build: Build, workers: int) -> None:
    flags = ['--aug-repeats', '3', '--reprob', '0.5']
    one, two = (build(*flags, rank=rank, world_size=2, workers=workers) for rank in (0, 1))
    whole = one.take(1)
    assert same(build(*flags, rank=0, world_size=2).take(1, 1), whole[1:])
    order = [index for key in data._stream(two.loader).batch_sampler for index in key.indices]
    assert len(set(order)) < len(order)  # both copies in one process
    other = two.take(1)
    pictures = {row.numpy().tobytes() for batches in (whole, other) for batch, _ in batches for row in batch}
    assert len(pictures) == 24  # each copy is augmented in its own way


def test_a_sample_does_not_depend_on_its_batch(build: Build) -> None:
    def rows(*flags: str, **kwargs: Any) -> set[bytes]:
        batches = build(*flags, '--aa', 'rand-m9', **kwargs).take(3)
        return {row.numpy().tobytes() for batch, _ in batches for row in batch}

    assert rows() == rows('-b', '8') == rows(rank=0, world_size=2) | rows(rank=1, world_size=2)


def test_mixing_ends_at_its_epoch(build: Build) -> None:
    for flags in (['--mixup', '1'], ['--mixup', '1', '--no-prefetcher']):
        for workers in (0, 2):
            prepared = build(*flags, '--mixup-off-epoch', '1', '--smoothing', '0', workers=workers)
            assert any(target.max(1).values.min() < 1 for _, target in prepared.take(0))
            assert all(target.max(1).values.min() == 1 for _, target in prepared.take(1))
            assert any(target.max(1).values.min() < 1 for _, target in prepared.take(0))


@pytest.mark.parametrize('flags, words', [
    (['--mixup', '0.2', '-b', '5'], r'must be even, got \[5\]'),
    (['--cutmix', '1', '--train-img-sizes', '16', '24', '--train-batch-sizes', '4', '3'], 'must be even'),
    (['--max-bad-samples', '-1'], '--max-bad-samples'),
    (['--worker-seeding', 'some'], "'some'"),
    (['--train-img-sizes', '16', '24', '--train-batch-sizes', '4'], 'cannot be built'),
])
def test_flags_that_do_not_fit(build: Build, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(*flags)
