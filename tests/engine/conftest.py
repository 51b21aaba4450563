"""A tiny image folder, and runs of train and validate in this process."""
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from timm.layers import set_fast_norm

from cpool_vision.engine.settings.config import read_train, read_validate
from cpool_vision.engine.train.fit import train

CLASSES = ('cat', 'dog', 'owl')


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module', autouse=True)
def plain_norms() -> Iterator[None]:
    """A run with --fast-norm sets a global of timm that other tests would see."""
    yield
    set_fast_norm(False)


@pytest.fixture(scope='session')
def image_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with train/ (8 images of each of 3 classes) and validation/ (7 images in all), 16 x 16 pixels."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, counts in (('train', (8, 8, 8)), ('validation', (3, 3, 1))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3))
                pixels[..., label] = 255 - pixels[..., label] // 4
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    return str(root)


@pytest.fixture(scope='session')
def flags_into(image_root: str) -> Callable[[Any], list[str]]:
    """Flags of a run of a second or so below a folder, with random crops, flips and dropout."""
    return lambda folder: [
        '--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-b', '8',
        '-j', '0', '--epochs', '2', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3', '--drop', '0.2',
        '--device', 'cpu', '--output', str(folder)]


@pytest.fixture
def base_flags(flags_into: Callable[[Any], list[str]], tmp_path: Any) -> list[str]:
    """Flags of a run of a second or so below the folder of the test."""
    return flags_into(tmp_path / 'runs')


@pytest.fixture
def train_args() -> Callable[..., Any]:
    """Parses flags of train.py."""
    return lambda *flags: read_train(list(flags))


@pytest.fixture
def validate_args() -> Callable[..., Any]:
    """Parses flags of validate.py."""
    return lambda *flags: read_validate(list(flags))


@pytest.fixture
def run_train(base_flags: list[str]) -> Callable[..., dict[str, Any]]:
    """Trains in this process with `base_flags` and further ones; returns the result."""
    return lambda *flags: train(read_train([*base_flags, *flags]))


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'store'), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def load() -> Callable[..., dict[str, Any]]:
    """Loads a checkpoint as the strictest reader would: tensors and plain values only."""
    return lambda *parts: torch.load(os.path.join(*parts), map_location='cpu', weights_only=True)
