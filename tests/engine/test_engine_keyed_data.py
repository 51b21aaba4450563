"""Training batches: the same bits for any number of workers and from any position, whatever was drawn before."""
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset

from cpool_vision.engine import data, keyed
from cpool_vision.engine.device import Precision
from cpool_vision.engine.errors import ConfigError, DatasetError
from cpool_vision.engine.sampling import BatchKeys

INPUT = {'input_size': (3, 24, 24), 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4), 'interpolation': 'bilinear',
         'crop_pct': 0.9}
CPU = torch.device('cpu')
Batch = tuple[torch.Tensor, torch.Tensor]
Build = Callable[..., Any]

CASES = {
    'plain': [],
    'randaugment': ['--aa', 'rand-m9-mstd0.5-inc1', '--reprob', '0.7', '--color-jitter-prob', '0.5'],
    'autoaugment': ['--aa', 'original-mstd0.5', '--reprob', '0.5', '--remode', 'rand', '--recount', '3'],
    'augmix': ['--aa', 'augmix-m5-w4-d2', '--aug-splits', '3', '--resplit', '--reprob', '0.9'],
    'blur': ['--grayscale-prob', '0.3', '--gaussian-blur-prob', '0.3', '--train-crop-mode', 'rkrr', '--vflip', '0.5'],
    'mixed': ['--mixup', '0.4', '--cutmix', '1', '--mixup-prob', '0.8', '--reprob', '0.3'],
    'pairs': ['--mixup', '0.4', '--cutmix', '1', '--mixup-mode', 'pair'],
    'elements': ['--cutmix-minmax', '0.2', '0.7', '--mixup-mode', 'elem', '--mixup-off-epoch', '2'],
    'unfetched': ['--no-prefetcher', '--mixup', '0.4', '--cutmix', '1', '--reprob', '0.7', '--aa', 'rand-m5'],
    'unfetched_splits': ['--no-prefetcher', '--aug-splits', '2', '--aa', 'augmix-m5', '--reprob', '0.7', '--resplit'],
    'sizes': ['--train-img-sizes', '24', '16', '--train-batch-sizes', '4', '6', '--aa', 'rand-m5', '--reprob', '0.5'],
    'progressive': ['--train-img-sizes', '16', '24', '--train-size-schedule', 'progressive', '--epochs', '3', '--mixup',
                    '0.2', '--train-batches-per-epoch', '9'],
    'bfloat16': ['--model-dtype', 'bfloat16', '--reprob', '0.7'],
}


@pytest.fixture
def build(image_root: str, train_args: Callable[..., Any]) -> Build:
    """Builds the loader of flags; iterating over what is returned gives batches as the training step sees them."""
    def make(*flags: str, rank: int = 0, world_size: int = 1, workers: int = 0) -> Any:
        args = train_args('--data-dir', image_root, '--num-classes', '3', '-b', '4', '-j', str(workers), *flags)
        args.rank, args.world_size, args.distributed = rank, world_size, world_size > 1
        dtype = torch.bfloat16 if args.model_dtype else None
        loader, mixup_fn = data.build_train_loader(args, INPUT, CPU, Precision(dtype, None, 'cpu'))
        return Prepared(loader, mixup_fn)
    return make


class Prepared:
    """A loader and what the training step does to its batches."""

    def __init__(self, loader: Any, mixup_fn: Any) -> None:
        self.loader, self.mixup_fn = loader, mixup_fn

    def take(self, epoch: int, batch: int = 0, stop: int | None = None) -> list[Batch]:
        """Batches from a position on."""
        data.set_position(self.loader, epoch, batch)
        taken = []
        for image, target in self.loader:
            if self.mixup_fn is not None:
                image, target = self.mixup_fn(image, target)
            taken.append((image.clone(), target.clone()))
            if len(taken) == stop:
                break
        return taken


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True))


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def check_workers_and_positions(build: Build, flags: list[str], workers: int) -> None:
    alone = build(*flags)
    whole = {epoch: alone.take(epoch) for epoch in (0, 1)}
    assert len(whole[0]) == len(alone.loader) >= 3
    assert not same(whole[0], whole[1])
    assert same(alone.take(1), whole[1])
    helped = build(*flags, workers=workers)
    random.seed(0)
    torch.manual_seed(0)
    for epoch, batch in ((1, 2), (0, 0), (1, 1), (1, len(alone.loader))):  # the workers stay from one to the next
        assert same(helped.take(epoch, batch), whole[epoch][batch:])
        assert len(helped.loader) == len(alone.loader)


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


def test_mixing_differs_between_processes(build: Build) -> None:
    flags = ['--no-aug', '--mixup', '0.4']
    one, two = (build(*flags, rank=rank, world_size=2).take(0) for rank in (0, 1))
    weights = [sorted({round(float(target.max()), 5) for _, target in batches}) for batches in (one, two)]
    assert weights[0] != weights[1]


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


def test_workers_stay_from_epoch_to_epoch(build: Build) -> None:
    prepared = build(workers=2)
    prepared.take(0, 0, stop=1)
    workers = [worker.pid for worker in data._stream(prepared.loader).loader._iterator._workers]
    whole = build().take(1)
    assert same(prepared.take(1), whole)  # after an epoch that was left in the middle
    assert [worker.pid for worker in data._stream(prepared.loader).loader._iterator._workers] == workers


def test_an_iterator_kept_over_epochs_reads_ahead(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build()
    expected = {place: plain.take(*place) for place in ((0, 0), (1, 0), (0, 3))}
    eager = build('--use-multi-epochs-loader', workers=2)
    begun: list[tuple[int, int]] = []
    real = BatchKeys._keys
    monkeypatch.setattr(BatchKeys, '_keys', lambda self, *place: begun.append(place) or real(self, *place))
    assert same(eager.take(0), expected[0, 0])
    assert begun[-1] == (1, 0)
    begun.clear()
    assert same(eager.take(1), expected[1, 0])
    assert begun == [(2, 0)]
    assert same(eager.take(0, 3), expected[0, 3])  # not what was loaded ahead
    assert begun[1:] == [(0, 3), (1, 0)]
    assert same(eager.take(1), expected[1, 0])


def test_mixing_ends_at_its_epoch(build: Build) -> None:
    for flags in (['--mixup', '1'], ['--mixup', '1', '--no-prefetcher']):
        for workers in (0, 2):
            prepared = build(*flags, '--mixup-off-epoch', '1', '--smoothing', '0', workers=workers)
            assert any(target.max(1).values.min() < 1 for _, target in prepared.take(0))
            assert all(target.max(1).values.min() == 1 for _, target in prepared.take(1))
            assert any(target.max(1).values.min() < 1 for _, target in prepared.take(0))


class Seeded:
    """A transform with a generator of its own, in the manner of albumentations."""

    def __init__(self) -> None:
        self.generator = random.Random(0)  # noqa: S311

    def set_random_seed(self, seed: int) -> None:
        self.generator.seed(seed)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.full((3, 24, 24), self.generator.randrange(256), dtype=torch.uint8)


class Inside:
    """A composition that holds it."""

    def __init__(self, part: Any) -> None:
        self.transforms = [part]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transforms[0](image)


@pytest.mark.parametrize('wrap', [lambda part: part, Inside])
def test_transforms_with_their_own_generator_are_seeded(build: Build, wrap: Callable[[Any], Any]) -> None:
    def take(workers: int, epoch: int, batch: int, transform: Any) -> list[Batch]:
        prepared = build(workers=workers)
        prepared.take(0, 4)
        prepared.loader.dataset.transform = transform
        return prepared.take(epoch, batch)

    whole = take(0, 1, 0, wrap(Seeded()))
    assert len({float(row[0, 0, 0]) for batch, _ in whole for row in batch}) > 12
    assert same(take(0, 1, 2, wrap(Seeded())), whole[2:])
    assert not same(take(0, 0, 0, wrap(Seeded())), whole)

    class Unseeded(Seeded):
        set_random_seed = None  # type: ignore[assignment]

        def __getattribute__(self, name: str) -> Any:
            if name == 'set_random_seed':
                raise AttributeError(name)
            return super().__getattribute__(name)

    assert not same(take(0, 1, 2, wrap(Unseeded())), take(0, 1, 0, wrap(Unseeded()))[2:])


def test_transforms_with_their_own_generator_in_workers(build: Build) -> None:
    taken = []
    for workers in (0, 2):
        prepared = build(workers=workers)
        prepared.loader.dataset.transform = Seeded()
        taken.append(prepared.take(1))
    assert same(*taken)


@pytest.mark.parametrize('flags, words', [
    (['--mixup', '0.2', '-b', '5'], r'must be even, got \[5\]'),
    (['--cutmix', '1', '--train-img-sizes', '16', '24', '--train-batch-sizes', '4', '3'], 'must be even'),
    (['--max-bad-samples', '-1'], '--max-bad-samples'),
    (['--train-img-sizes', '16', '24', '--train-batch-sizes', '4'], 'cannot be built'),
])
def test_flags_that_do_not_fit(build: Build, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(*flags)


@pytest.mark.slow
def test_workers_that_are_not_forked(build: Build) -> None:
    prepared = build(*CASES['mixed'], workers=1)
    data._stream(prepared.loader).loader.multiprocessing_context = 'spawn'
    assert same(prepared.take(1, 2), build(*CASES['mixed']).take(1, 2))


class Shards:
    """A streamed set whose workers share the images of an order drawn per epoch."""

    def __init__(self) -> None:
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        order = list(range(24))
        random.Random(int(self.epoch)).shuffle(order)  # noqa: S311
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (24, 20, 20, 3), np.uint8)
        for index in order[worker.id::worker.num_workers] if worker else order:
            yield Image.fromarray(pixels[index]), index % 3


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', ['randaugment', 'mixed', 'unfetched'])
def test_streamed_sets_are_entered_by_loading_again(
        build: Build, name: str, workers: int, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(data, 'build_dataset', lambda *_: IterableImageDataset('', reader=Shards()))
    caplog.set_level(logging.INFO, 'cpool_vision')
    random.seed(1)
    one = build(*CASES[name], workers=workers)
    before = states()
    whole = {epoch: one.take(epoch) for epoch in (0, 1)}
    assert states() == before
    assert len(whole[0]) == len(one.loader) == 6 and not same(*whole.values())
    two = build(*CASES[name], workers=workers)
    for epoch, batch in ((1, 2), (0, 5)):
        torch.manual_seed(epoch)
        assert same(two.take(epoch, batch), whole[epoch][batch:])
    assert 'loading 2 batches of epoch 1 again' in caplog.text
    with pytest.raises(DatasetError, match='ended after 6 batches, before the position 7'):
        two.take(0, 7)
    with pytest.raises(ConfigError, match='no batch -1'):
        data.set_position(two.loader, 0, -1)
    assert data.unreadable_report(two.loader) == [] and data.share_unreadable(two.loader, CPU) == 0


@pytest.fixture
def broken(image_root: str, tmp_path: Path) -> str:
    """The image folder with two training images that cannot be read."""
    root = tmp_path / 'broken'
    shutil.copytree(image_root, root)
    (root / 'train' / 'cat' / '3.png').write_bytes(b'garbage')
    victim = root / 'train' / 'dog' / '0.png'  # numbers 3 and 8
    victim.write_bytes(victim.read_bytes()[:200])
    return str(root)


@pytest.mark.parametrize('flags', [
    [], ['--aa', 'augmix-m5', '--aug-splits', '2'], CASES['sizes'], ['--no-prefetcher'],
    ['--dataset', 'torch/image_folder']], ids=['folder', 'splits', 'sizes', 'unfetched', 'torchvision'])
def test_unreadable_images_are_replaced_in_the_same_way(
        build: Build, broken: str, image_root: str, flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, '--data-dir', broken, '--max-bad-samples', '2']
    if 'torch/image_folder' in flags:
        flags[flags.index('--data-dir') + 1] = os.path.join(broken, 'train')
    one, two = build(*flags), build(*flags, workers=2)
    data.list_unreadable(two.loader, str(tmp_path))
    whole = one.take(0)
    assert same(two.take(0, 2), whole[2:])
    assert same(two.take(0), whole)
    assert not same(one.take(1), whole)
    report = data.unreadable_report(one.loader)
    assert [(image.index, image.path[-9:]) for image in report] == [(3, 'cat/3.png'), (8, 'dog/0.png')]
    assert 'identify' in report[0].reason and report[1].reason
    assert [image.index for image in data.unreadable_report(two.loader)] == [3, 8]
    with open(tmp_path / 'unreadable.txt', encoding='utf-8') as file:
        assert [line.split('\t')[0] for line in file] == ['3', '8']


def test_replacements_are_other_images_and_differ(build: Build, broken: str) -> None:
    pictures = []
    for epoch in range(6):
        batches = build('--no-aug', '--data-dir', broken, '--max-bad-samples', '2').take(epoch)
        rows = [row.numpy().tobytes() for batch, _ in batches for row in batch]
        assert len(rows) == 24
        pictures.append([row for row in set(rows) if rows.count(row) > 1])
        assert pictures[-1]  # a readable image stands in, and comes twice
    assert len({row for rows in pictures for row in rows}) > 3


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_unreadable_images_end_the_run(build: Build, broken: str, tmp_path: Path, workers: int) -> None:
    prepared = build('--data-dir', broken, workers=workers)  # the default allows one in a thousand, here one
    data.list_unreadable(prepared.loader, str(tmp_path))
    with pytest.raises(DatasetError, match=r'2 training images .* allows \(1\): .*(cat/3|dog/0).png.* raise --max-bad'):
        prepared.take(0)
    assert (tmp_path / 'unreadable.txt').read_text() == '3\tcat/3.png\n8\tdog/0.png\n'
    with pytest.raises(DatasetError, match=r'1 training image'):
        build('--data-dir', broken, '--max-bad-samples', '0').take(0)


def test_the_list_of_a_resumed_run_is_kept(build: Build, broken: str, tmp_path: Path) -> None:
    (tmp_path / 'unreadable.txt').write_text('5\tcat/5.png\n')
    prepared = build('--data-dir', broken, '--max-bad-samples', '0.1')
    prepared.take(0)
    data.list_unreadable(prepared.loader, str(tmp_path))
    assert (tmp_path / 'unreadable.txt').read_text() == '3\tcat/3.png\n5\tcat/5.png\n8\tdog/0.png\n'
    assert data.share_unreadable(prepared.loader, CPU) == 2
    assert sorted(os.listdir(tmp_path)) == ['broken', 'unreadable.txt']


@pytest.mark.parametrize('workers', [0, 1])
def test_a_set_without_readable_images_ends_the_run(
        build: Build, image_root: str, tmp_path: Path, workers: int) -> None:
    for label in ('cat', 'dog', 'owl'):
        folder = tmp_path / 'train' / label
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f'{number}.png').write_bytes(b'garbage')
    with pytest.raises(DatasetError, match='no readable image was found in place of'):
        build('--data-dir', str(tmp_path), '--max-bad-samples', '1000', workers=workers).take(0)


def test_faults_of_a_transform_are_not_taken_for_unreadable_images(build: Build) -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        raise OSError('of the transform')

    prepared = build()
    prepared.loader.dataset.transform = transform
    with pytest.raises(OSError, match='of the transform'):
        prepared.take(0)
