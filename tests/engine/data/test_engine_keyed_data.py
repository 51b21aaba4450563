"""Training batches: the same bits for any number of workers and from any position, whatever was drawn before."""
import contextlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from loader_tools import CASES, Build, Inside, Seeded, Unseeded, builder, check_workers_and_positions, same, states
from timm.data import FastCollateMixup
from timm.data.random_erasing import RandomErasing

from cpool_vision.engine.data import keyed
from cpool_vision.engine.data import loaders as data
from cpool_vision.errors import ConfigError


@pytest.fixture
def build(image_root: str, train_args: Callable[..., Any]) -> Build:
    """Builds training loaders."""
    return builder(image_root, train_args)


@pytest.mark.parametrize('name', CASES)
def test_batches_depend_on_seed_epoch_and_position_only(build: Build, name: str) -> None:
    check_workers_and_positions(build, CASES[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 4])
@pytest.mark.parametrize('name', CASES)
def test_batches_with_other_numbers_of_workers(build: Build, name: str, workers: int) -> None:
    check_workers_and_positions(build, CASES[name], workers)


@pytest.mark.parametrize('name, broken', [
    ('plain', 'samples'), ('augmix', 'samples'), ('unfetched_splits', 'samples'), ('sizes', 'samples'),
    ('mixed', 'mixing'), ('unfetched', 'mixing'), ('progressive', 'mixing'), ('randaugment', 'erasing')])
def test_the_comparison_sees_what_is_not_keyed(
        build: Build, name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == 'samples':  # drawn from the generators of whichever process makes the sample
        monkeypatch.setattr(keyed.KeyedDataset, '_make', lambda self, index, seed, choice: self.dataset[
            index if choice is None else (index, choice)])
    else:  # drawn from what the last batch left behind
        stream = {'mixing': keyed.MIXING, 'erasing': keyed.ERASING}[broken]
        real, drawn = keyed.keyed_seeds, random.Random(0)  # noqa: S311
        monkeypatch.setattr(keyed, 'keyed_seeds', lambda kind, *keys: [
            drawn.getrandbits(63)] if kind == stream else real(kind, *keys))
    with pytest.raises(AssertionError):
        check_workers_and_positions(build, CASES[name], 2)


def test_the_comparison_sees_a_lost_position(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build().take(1)
    real = data.set_position
    monkeypatch.setattr(data, 'set_position', lambda loader, epoch, batch: real(loader, epoch))
    assert not same(build().take(1, 2), whole[2:])
    monkeypatch.setattr(data, 'set_position', lambda loader, epoch, batch: real(loader, 0, batch))
    assert not same(build().take(1, 2), whole[2:])


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


class Accelerator:
    """A device module with one generator."""

    def __init__(self, with_index: bool) -> None:
        self.state, self.seeded = torch.tensor([7]), []
        self.places = 1 if with_index else 0
        if with_index:
            self.device = contextlib.nullcontext

    def get_rng_state(self, *device: torch.device) -> torch.Tensor:
        assert len(device) == self.places
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor, *device: torch.device) -> None:
        assert len(device) == self.places
        self.state = state

    def manual_seed(self, seed: int) -> None:
        self.seeded.append(seed)
        self.state = torch.tensor([seed])


@pytest.mark.parametrize('kind', ['cuda', 'mps'])
def test_the_generator_of_a_device_is_seeded_and_given_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Accelerator(with_index=kind == 'cuda')
    monkeypatch.setattr(torch, 'get_device_module', lambda device: module)
    drawn = []
    for batch in (0, 1, 0):
        keyed.KeyedErasing(lambda images: drawn.append(int(module.state)), Place(0, batch), 5, 0, torch.device(kind))(
            torch.zeros(1))
        assert int(module.state) == 7
    assert drawn == module.seeded and drawn[0] == drawn[2] != drawn[1]


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
    data.set_position(loader, 3, 2)
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


@pytest.mark.parametrize('transform', [Seeded, Inside])
@pytest.mark.parametrize('name', ['plain', 'sizes', 'unfetched_plain'])
def test_transforms_with_their_own_generator_are_seeded(build: Build, name: str, transform: Any) -> None:
    flags = {'plain': ['--reprob', '0.5'], 'unfetched_plain': ['--no-prefetcher'],
             'sizes': ['--train-img-sizes', '24', '16']}[name]
    whole = build(*flags, transform=transform).take(1)
    assert len({float(row[0, 0, 0]) for batch, _ in whole for row in batch}) > 12
    assert {batch.shape[-1] for batch, _ in whole} == ({16, 24} if name == 'sizes' else {24})
    check_workers_and_positions(lambda *flags, **kw: build(*flags, **kw, transform=transform), flags, 2)


@pytest.mark.parametrize('transform', [Unseeded, lambda size: Inside(size, Unseeded)])
def test_the_comparison_sees_a_transform_that_is_not_seeded(build: Build, transform: Any) -> None:
    with pytest.raises(AssertionError):
        check_workers_and_positions(lambda *flags, **kw: build(*flags, **kw, transform=transform), [], 2)


def test_a_transform_can_be_set_later(build: Build) -> None:
    prepared = build()
    prepared.take(1)
    prepared.loader.dataset.transform = Seeded((3, 24, 24))
    assert same(prepared.take(1), build(transform=Seeded).take(1))


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


@pytest.mark.parametrize('flags, words', [(['--aug-splits', '2', '--aa', 'rand-m5'], '--aug-splits goes with'),
                                          (['--no-prefetcher', '--reprob', '0.1'], 'drop --no-prefetcher')])
def test_flags_that_do_not_fit_a_transform_of_the_caller(build: Build, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(*flags, transform=Seeded)
