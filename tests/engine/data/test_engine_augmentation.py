"""--aug-config: batches that depend on seed, epoch and image alone, and runs that go on with the same pipeline."""
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loader_tools import INPUT, Build
from resume_tools import break_off

from cpool_vision.cli import train as cli_train
from cpool_vision.data.augment import Pipeline
from cpool_vision.data.augment_config import list_presets
from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data.augmentation import check_same_pipeline
from cpool_vision.engine.settings import train
from cpool_vision.errors import ConfigError

Train = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Writes a pipeline and returns its path."""
    def write(content: Any, name: str = 'aug.json') -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)
    return write


def images(batches: list[Any]) -> list[bytes]:
    return [image.numpy().tobytes() for batch, _ in batches for image in batch]


def test_epochs_and_images_are_augmented_differently(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = build('--aug-config', 'imagenet')
    order = prepared.loader.loader.batch_sampler.order
    monkeypatch.setattr(type(order), 'draw', lambda self, epoch: (
        torch.arange(24).numpy(), torch.zeros(24, dtype=torch.int64).numpy()))
    one, two = images(prepared.take(0)), images(prepared.take(1))
    assert all(a != b for a, b in zip(one, two, strict=True))  # the same images in the same order
    monkeypatch.setattr(type(order), 'draw', lambda self, epoch: (
        torch.arange(24).numpy() * 0, torch.arange(24).numpy()))
    assert len(set(images(prepared.take(0)))) == 24  # copies of one image


def test_a_sample_does_not_depend_on_its_batch_or_process(build: Build) -> None:
    def drawn(*flags: str, **kwargs: Any) -> set[bytes]:
        return set(images(build('--aug-config', 'light', *flags, **kwargs).take(3)))

    assert drawn() == drawn('-b', '8') == drawn(rank=0, world_size=2) | drawn(rank=1, world_size=2, workers=2)


def test_the_prefetcher_gets_bytes_and_normalizes_them(build: Build) -> None:
    fetched, unfetched = (build('--aug-config', 'cifar', *flags).take(0) for flags in ([], ['--no-prefetcher']))
    for (one, label), (two, other) in zip(fetched, unfetched, strict=True):
        assert one.dtype == two.dtype == torch.float32 and torch.equal(label, other)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    raw = Pipeline('cifar').build(INPUT['input_size'])
    inner = build('--aug-config', 'cifar').loader.loader.dataset.dataset.transform
    assert inner.size == raw.size and inner._scale is None
    mean, std = (torch.tensor(INPUT[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = (fetched[0][0] * std + mean) * 255
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)


def test_mixing_and_erasing_still_act(build: Build) -> None:
    plain = build('--aug-config', 'light').take(0)
    mixed = build('--aug-config', 'light', '--mixup', '0.5').take(0)
    erased = build('--aug-config', 'light', '--reprob', '1').take(0)
    assert mixed[0][1].shape == (4, 3) and not torch.equal(mixed[0][0], plain[0][0])
    changed = [(one != two).any(0).float().mean() for (a, _), (b, _) in zip(plain, erased, strict=True)
               for one, two in zip(a, b, strict=True)]
    assert all(0 < float(share) < 0.5 for share in changed)


@pytest.mark.parametrize('flags, words', [
    (['--aa', 'rand-m5'], '--aug-config light replaces --aa'),
    (['--aug-splits', '2'], 'replaces --aug-splits'), (['--no-aug'], 'replaces --no-aug'),
    (['--vflip', '1'], '--vflip'),
    (['--grayscale-prob', '0.1'], '--grayscale-prob'), (['--train-crop-mode', 'rkrr'], '--train-crop-mode'),
    (['--no-prefetcher', '--reprob', '0.1'], 'put Erasing into the pipeline'),
    (['--aug-config', 'ligth'], "--aug-config: there is no augmentation preset 'ligth': did you mean light"),
    (['--aug-config', '/none/a.yaml'], "/none/a.yaml' cannot be read"),
])
def test_flags_that_do_not_go_together(build: Build, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build('--aug-config', 'light', *flags)


def test_the_naflex_loader_is_refused_and_idle_flags_are_named(run_train: Train, caplog: Any) -> None:
    with pytest.raises(ConfigError, match='replaces --naflex-loader'):
        run_train('--aug-config', 'light', '--naflex-loader')
    run_train('--aug-config', 'light', '--hflip', '0.2', '--color-jitter', '0', '--epochs', '1')
    assert "replaces timm's transforms. Ignored: --hflip, --color-jitter." in caplog.text


def test_a_pipeline_of_another_size_is_refused_before_training(build: Build, write: Callable[..., str]) -> None:
    path = write(['HorizontalFlip'])
    with pytest.raises(ConfigError, match=r'made 16 x 16 pixels in 3 channels.*the network takes 24 x 24'):
        build('--aug-config', path)
    build('--aug-config', path, '--train-img-sizes', '16')
    with pytest.raises(ConfigError, match='fails on an image of 16 x 16'):
        build('--aug-config', write([{'RandomCrop': {'height': 20, 'width': 'input'}}]))


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_that_does_not_fit_later_on_is_a_typed_error(
        build: Build, write: Callable[..., str], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, 'try_pipeline', lambda *_: None)
    prepared = build('--aug-config', write([{'Resize': {'height': 8, 'width': 8}}]), workers=workers)
    with pytest.raises(ConfigError, match='made 8 x 8 pixels'):
        prepared.take(0)
    data.close_workers(prepared.loader)


def test_a_typo_is_one_line_and_exit_code_2(base_flags: list[str], write: Callable[..., str], capsys: Any) -> None:
    path = write([{'RandomResizedCrop': {'size': 'input', 'scael': [0.5, 1]}}])
    assert cli_train.main([*base_flags, '--aug-config', path]) == 2
    err = capsys.readouterr().err
    assert "RandomResizedCrop has no argument 'scael': did you mean scale" in err and 'Traceback' not in err


def test_a_resumed_run_has_the_same_pipeline(run_train: Train, write: Callable[..., str], caplog: Any) -> None:
    crop = {'RandomResizedCrop': {'size': 'input', 'scale': [0.5, 1]}}
    path = write([crop, {'HorizontalFlip': {'p': 0.5}}])
    flags = ['-b', '4', '--experiment', 'x', '--resume', 'auto', '--recovery-interval', '2']
    break_off(lambda: run_train(*flags, '--aug-config', path), 3)
    folder = os.path.join(os.path.dirname(path), 'runs', 'x')
    with open(os.path.join(folder, 'augmentation.json'), encoding='utf-8') as file:
        before = file.read()
    for other, words in (
            ([crop, {'HorizontalFlip': {'p': 0.4}}], r'transforms 2 HorizontalFlip p was 0.5, now 0.4'),
            ([crop, {'VerticalFlip': {'p': 0.5}}], 'transforms 2 was HorizontalFlip, now VerticalFlip'),
            ([crop], r"transforms was \['RandomResizedCrop', 'HorizontalFlip'\], now \['RandomResizedCrop'\]")):
        with pytest.raises(ConfigError, match=f'recovery-0-2.*different --aug-config: .*{words}.*augmentation.json'):
            run_train(*flags, '--aug-config', write(other, 'other.json'))
    with pytest.raises(ConfigError, match="an albumentations pipeline, now timm's transforms"):
        run_train(*flags)
    with open(os.path.join(folder, 'augmentation.json'), encoding='utf-8') as file:
        assert file.read() == before
    with pytest.raises(ConfigError, match='recovery-0-2.*different --aug-config'):
        run_train('-b', '4', '--aug-config', 'light', '--resume', os.path.join(folder, 'recovery-0-2.pth.tar'))
    # its own record is the same pipeline
    done = run_train(*flags, '--aug-config', os.path.join(folder, 'augmentation.json'))['folder']
    last = os.path.join(done, 'last.pth.tar')
    run_train('-b', '4', '--epochs', '3', '--aug-config', 'light', '--experiment', 'y', '--resume', last)
    assert 'last.pth.tar was trained with a different --aug-config: ' in caplog.text
    run_train('-b', '4', '--epochs', '3', '--experiment', 'x', '--resume', last)  # whole epoch, named: allowed
    assert sorted(name for name in os.listdir(done) if name.startswith('aug')) == ['augmentation.1.json']


@pytest.mark.parametrize('content', [{}, {'args': None}, {'args': {'model': 'x'}}])
def test_checkpoints_that_name_no_pipeline_are_accepted(content: dict[str, Any]) -> None:
    check_same_pipeline(content, 'x', {'transform': {}}, refuse=True)


def test_help_names_the_presets() -> None:
    action = next(each for each in train.build_parser()._actions if each.dest == 'aug_config')
    assert f'({", ".join(list_presets())})' in str(action.help)


def test_another_release_counts_as_another_pipeline() -> None:
    with pytest.raises(ConfigError, match='__version__ was 2.0.7, now 2.0.8'):
        check_same_pipeline({'args': {'aug_pipeline': {'__version__': '2.0.7'}}}, 'x', {'__version__': '2.0.8'}, True)
