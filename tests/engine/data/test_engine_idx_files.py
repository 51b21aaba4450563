"""Fashion-MNIST from its four IDX files, without a download."""
import struct
from pathlib import Path

import numpy as np
import pytest

from cpool_vision.cli import train as train_command
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.train.fit import train


def write_idx(folder: Path, prefix: str, count: int) -> None:
    """Images of one brightness by class, and their labels, in the format that the set comes in."""
    labels = np.arange(count, dtype=np.uint8) % 10
    images = np.broadcast_to((labels * 25)[:, None, None], (count, 28, 28)).astype(np.uint8)
    (folder / f'{prefix}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, count, 28, 28) + images.tobytes())
    (folder / f'{prefix}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, count) + labels.tobytes())


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    write_idx(raw, 'train', 40)
    write_idx(raw, 't10k', 20)
    return ['--config', 'fashion_mnist_resnet_micro', '--data-dir', str(tmp_path), '--epochs', '1',
            '--warmup-epochs', '0', '-b', '20', '-j', '0', '--device', 'cpu', '--output', str(tmp_path / 'runs'),
            '--model-kwargs', 'channels=[8,8,8,8]', 'layers=[1,1,1,1]', 'cpool_groups=1']


def test_the_recipe_trains_on_the_files(flags: list[str]) -> None:
    row, = train(read_train(flags))['epochs']
    assert row['train_loss'] > 0 and row['eval_loss'] > 0
    assert 0 <= row['eval_top1'] <= 100 and round(row['eval_top1'] / 5, 6).is_integer()  # of twenty images


def test_missing_files_are_one_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'FashionMNIST' / 'raw' / 't10k-labels-idx1-ubyte').unlink()
    assert train_command.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and '--dataset-download' in error
