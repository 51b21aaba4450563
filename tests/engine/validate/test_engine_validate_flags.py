"""What the flags of validate.py do: a model whose logits are its input shows what it was fed with."""
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import register_model

from cpool_vision.engine.validate.bulk import run_validation
from cpool_vision.errors import ConfigError

SIDE = 8


class Eye(nn.Module):
    """Its logits are the pixels that it gets; one weight, so that it has a checkpoint."""

    num_classes = 3 * SIDE * SIDE

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.pretrained_cfg = self.default_cfg = {
            'input_size': (3, SIDE, SIDE), 'mean': (0., 0., 0.), 'std': (1., 1., 1.), 'interpolation': 'nearest',
            'crop_pct': 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).flatten(1)


@register_model
def test_eye(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return Eye(**kwargs)


test_eye.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def seen(validate_args: Callable[..., Any], tmp_path: Path) -> Callable[..., torch.Tensor]:
    """What a model is fed with (3, side, side), of an image of 24 x 16 pixels, red by row and green by column."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(16)[:, None] * 10, np.arange(24) * 10
    (tmp_path / 'images' / 'class').mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / 'images' / 'class' / 'one.png')
    torch.save(Eye().state_dict(), tmp_path / 'eye.pth')

    def look(*flags: str) -> torch.Tensor:
        run_validation(validate_args(
            '--data-dir', str(tmp_path / 'images'), '--split', '', '--model', 'test_eye', '--checkpoint',
            str(tmp_path / 'eye.pth'), '-j', '0', '-b', '1', '--device', 'cpu', '--predictions',
            str(tmp_path / 'seen.npz'), *flags))
        with np.load(tmp_path / 'seen.npz') as arrays:
            return torch.from_numpy(arrays['logits']).view(3, SIDE, SIDE) * 255

    return look


def test_the_crop(seen: Callable[..., torch.Tensor]) -> None:
    def middle(count: int, start: int, step: int) -> list[float]:
        return [10. * (start + step * place + step // 2) for place in range(count)]

    red, green, _ = seen()  # 8 of 12 columns
    assert red[:, 0].tolist() == middle(8, 0, 2) and green[0].tolist() == pytest.approx(middle(8, 4, 2))
    red, green, _ = seen('--crop-mode', 'squash')
    assert red[:, 0].tolist() == middle(8, 0, 2) and green[0].tolist() == pytest.approx(middle(8, 0, 3))
    red, green, _ = seen('--crop-border-pixels', '2')  # 12 x 8 pixels are scaled to, 2 of each side are cut off
    assert red[0, 0] > 0 and green[0, 0] > middle(8, 4, 2)[0] - 10
    red, green, _ = seen('--crop-pct', '0.5')
    assert red[:, 0].tolist() == middle(8, 4, 1) and green[0].tolist() == middle(8, 8, 1)


def test_normalization_and_interpolation(seen: Callable[..., torch.Tensor]) -> None:
    plain = seen()
    torch.testing.assert_close(seen('--mean', '0.5', '0.5', '0.5', '--std', '0.5', '0.5', '0.5'), 2 * plain - 255)
    smooth = seen('--interpolation', 'bilinear')
    assert (smooth[0, :, 0].diff() > 0).all() and 0 < (smooth - plain).abs().max() < 20


def test_size_of_training(validate_args: Callable[..., Any], image_root: str, tmp_path: Path) -> None:
    torch.save(timm.create_model('test_mambaout', num_classes=3).state_dict(), tmp_path / 'weights.pth')
    for flags, side in (([], 192), (['--use-train-size'], 160)):
        row = run_validation(validate_args(
            '--data-dir', image_root, '--model', 'test_mambaout', '--num-classes', '3', '-j', '0', '-b', '4',
            '--device', 'cpu', '--checkpoint', str(tmp_path / 'weights.pth'), *flags))
        assert isinstance(row, dict) and row['img_size'] == side


@pytest.fixture
def measure(validate_args: Callable[..., Any], image_root: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Measures a fresh model on the folder of images."""
    def run(*flags: str, name: str = 'test_resnet', size: int = 32) -> Any:
        torch.manual_seed(0)
        torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / f'{name}.pth')
        return run_validation(validate_args(
            '--data-dir', image_root, '--model', name, '--num-classes', '3', '--img-size', str(size), '-j', '0',
            '-b', '2', '--device', 'cpu', '--checkpoint', str(tmp_path / f'{name}.pth'), *flags))

    return run


def test_the_split_and_its_size(measure: Callable[..., dict[str, Any]]) -> None:
    assert measure()['images'] == 7
    assert measure('--split', 'train')['images'] == 24


def test_the_size_of_a_stream(validate_args: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'weights.pth')
    row = run_validation(validate_args(
        '--dataset', 'cpool/shapes', '--num-classes', '10', '--num-samples', '12', '--model', 'test_resnet', '-j', '0',
        '--img-size', '32', '-b', '4', '--device', 'cpu', '--checkpoint', str(tmp_path / 'weights.pth')))
    assert isinstance(row, dict) and row['images'] == 12


def test_dense_pooling_takes_the_whole_image(measure: Callable[..., dict[str, Any]]) -> None:
    plain, pooled = measure(size=320), measure('--test-pool', size=320)
    assert (plain['crop_pct'], pooled['crop_pct']) == (0.95, 1.0)


def test_merged_branches_give_the_same_figures(measure: Callable[..., dict[str, Any]]) -> None:
    plain, merged = (measure(*flags, name='repghostnet_050') for flags in ([], ['--reparam']))
    assert merged['param_count'] < plain['param_count']
    assert merged['nll'] == pytest.approx(plain['nll'], abs=1e-3)


@pytest.mark.parametrize('interval, lines', [('1', 4), ('3', 2)])
def test_log_lines(measure: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture, interval: str, lines: int,
                   ) -> None:
    with caplog.at_level(logging.INFO):
        measure('--log-freq', interval)
    assert sum(']  loss' in record.getMessage() for record in caplog.records) == lines


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason='there are two devices')
def test_batches_are_not_split_over_devices_that_there_are_not(measure: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match='--num-gpu 2: . CUDA devices are available'):
        measure('--num-gpu', '2')


def test_fused_models_give_the_same_figures(measure: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip('networkx')
    assert measure('--aot-autograd')['nll'] == pytest.approx(measure()['nll'], abs=1e-5)


@pytest.mark.skipif(find_spec('tensorflow') is not None, reason='TensorFlow is installed')
def test_preprocessing_by_tensorflow_says_what_is_missing(measure: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match='--tf-preprocessing needs TensorFlow: pip install tensorflow'):
        measure('--tf-preprocessing')
