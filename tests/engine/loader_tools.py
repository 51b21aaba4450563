"""Training loaders in this process, and comparison of their batches."""
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.data.unreadable import Unreadable
from cpool_vision.engine.device import Precision, Runtime

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
    'albumentations': ['--aug-config', 'strong', '--mixup', '0.4', '--cutmix', '1', '--reprob', '0.5'],
    'albumentations_unfetched': ['--aug-config', 'strong', '--no-prefetcher', '--mixup', '0.4'],
    'albumentations_sizes': ['--aug-config', 'strong', '--train-img-sizes', '24', '16', '--train-batch-sizes', '4',
                             '6'],
}


class Prepared:
    """A loader and what the training step does to its batches."""

    def __init__(self, loader: Any, mixup_fn: Any) -> None:
        self.loader, self.mixup_fn = loader, mixup_fn

    def take(self, epoch: int, batch: int = 0, stop: int | None = None) -> list[Batch]:
        """Batches from a given batch on."""
        data.start_at(self.loader, epoch, batch)
        taken = []
        for image, target in self.loader:
            if self.mixup_fn is not None:
                image, target = self.mixup_fn(image, target)
            taken.append((image.clone(), target.clone()))
            if len(taken) == stop:
                break
        return taken


def builder(image_root: str, train_args: Callable[..., Any]) -> Build:
    """Function that builds the loader of flags for a process of so many."""
    def make(*flags: str, rank: int = 0, world_size: int = 1, workers: int = 0) -> Prepared:
        args = train_args('--data-dir', image_root, '--num-classes', '3', '-b', '4', '-j', str(workers), *flags)
        dtype = torch.bfloat16 if args.model_dtype else None
        runtime = Runtime(CPU, Precision(dtype, None, 'cpu'), rank, world_size)
        loader, mixup_fn = data.build_train_loader(args, runtime, INPUT, Classes(3))
        return Prepared(loader, mixup_fn)
    return make


def unreadable_images(loader: Any) -> list[Unreadable]:
    """Training images that this process has replaced so far, by index."""
    log = data._stream(loader).unreadable
    return [] if log is None else [log.found[index] for index in sorted(log.found)]


def same(one: list[Batch], two: list[Batch]) -> bool:
    """Whether batches are equal bit for bit."""
    return len(one) == len(two) and all(
        torch.equal(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True))


def states() -> tuple[Any, ...]:
    """Of the global generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def check_workers_and_positions(build: Build, flags: list[str], workers: int) -> None:
    """Compares batches of `workers` processes, from several positions, with those made in this process."""
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


class Shards:
    """A streamed dataset whose workers share the images of an order drawn per epoch."""

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
