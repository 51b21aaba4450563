"""What each flag of the training loader does to the images of a known folder."""
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loader_tools import INPUT, Build, Prepared
from PIL import Image
from timm.data.loader import PrefetchLoader

from cpool_vision.engine.data import loaders

# every image whole, scaled up in the same way each time
WHOLE = ('--scale', '1', '1', '--ratio', '1', '1', '--hflip', '0', '--color-jitter', '0', '--train-interpolation',
         'bilinear', '--smoothing', '0')
STEP = 1 / 255 / min(INPUT['std'])  # one level of 255 after normalization
SIZES = ('--train-img-sizes', '16', '24', '32', '--epochs', '3')
PROGRESSIVE = (*SIZES, '--train-size-schedule', 'progressive', '--train-size-random-mix', '0',
               '--train-size-schedule-spread', '0.01')


def images_of(prepared: Prepared) -> torch.Tensor:
    """Images `(24, 3, 24, 24)` in the order of the folder, whatever the order of the epoch, the first one."""
    order = _numbers(prepared)
    batches = taken(prepared)
    return batches[torch.tensor(order[:len(batches)]).argsort()]


def _numbers(prepared: Prepared) -> list[int]:
    loaders.start_at(prepared.loader, 0)
    return prepared.loader.sampler


def opened(image_root: str, resample: Image.Resampling = Image.Resampling.BILINEAR,
           box: tuple[int, int, int, int] = (0, 0, 16, 16)) -> torch.Tensor:
    """The same images, cut out, scaled and normalized by hand."""
    images = []
    for name in ('cat', 'dog', 'owl'):
        for number in range(8):
            with Image.open(os.path.join(image_root, 'train', name, f'{number}.png')) as image:
                pixels = torch.frombuffer(bytearray(image.crop(box).resize((24, 24), resample).tobytes()),
                                          dtype=torch.uint8)
            images.append(pixels.view(24, 24, 3).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(INPUT[key])[:, None, None] for key in ('mean', 'std'))
    return (torch.stack(images) - mean) / std


def close(one: torch.Tensor, two: torch.Tensor, levels: float = 1e-2) -> bool:
    """Whether images agree up to some of 255 levels."""
    return one.shape == two.shape and bool((one - two).abs().max() <= levels * STEP)


def pairs(image: torch.Tensor) -> torch.Tensor:
    """The images that those of batches of 4 are mixed with."""
    return image.unflatten(0, (-1, 4)).flip(1).flatten(0, 1)


def batches_of(prepared: Prepared, image: torch.Tensor) -> torch.Tensor:
    """Images of the folder in the order in which the first epoch takes them."""
    return image[torch.tensor(_numbers(prepared))]


def taken(prepared: Prepared) -> torch.Tensor:
    """Images of the first epoch, in its order."""
    return torch.cat([image for image, _ in prepared.take(0)])


def test_without_augmentation_images_are_those_of_the_folder(build: Build, image_root: str) -> None:
    assert close(images_of(build(*WHOLE)), opened(image_root))
    assert not close(images_of(build(*WHOLE, '--hflip', '1')), opened(image_root))  # control


EXACT: dict[str, tuple[list[str], Callable[[str], torch.Tensor]]] = {
    'hflip': (['--hflip', '1'], lambda root: opened(root).flip(-1)),
    'vflip': (['--vflip', '1'], lambda root: opened(root).flip(-2)),
    'ratio': (['--ratio', '0.5', '0.5'], lambda root: opened(root, box=(4, 0, 12, 16))),
    'train_interpolation': (['--train-interpolation', 'nearest'], lambda root: opened(root, Image.Resampling.NEAREST)),
    'no_aug': (['--no-aug', '--scale', '0.1', '0.2', '--hflip', '1'], opened),
    'no_prefetcher': (['--no-prefetcher'], opened),
    'color_jitter_prob': (['--color-jitter', '0.9', '--color-jitter-prob', '0'], opened),
    'mixup_prob': (['--mixup', '1', '--mixup-prob', '0'], opened),
}


@pytest.mark.parametrize('flag', EXACT)
def test_images_are_those_made_by_hand(build: Build, image_root: str, flag: str) -> None:
    flags, expected = EXACT[flag]
    prepared = build(*WHOLE, *flags)
    assert close(images_of(prepared), expected(image_root))
    assert isinstance(prepared.loader, PrefetchLoader) is (flag != 'no_prefetcher')


def _colors(image: torch.Tensor) -> torch.Tensor:
    return image * torch.tensor(INPUT['std'])[:, None, None] + torch.tensor(INPUT['mean'])[:, None, None]


def _roughness(image: torch.Tensor) -> torch.Tensor:
    return (image[..., 1:] - image[..., :-1]).abs().mean((1, 2, 3))


def _erased(image: torch.Tensor) -> torch.Tensor:
    return (image == 0).all(1).float().mean((1, 2))


CHANGED: dict[str, tuple[list[str], Callable[[torch.Tensor, torch.Tensor], Any]]] = {
    # what comes out, and the plain images
    'scale': (['--scale', '0.1', '0.1'], lambda image, plain: (_roughness(image) < _roughness(plain)).all()),
    'color_jitter': (['--color-jitter', '0.9'], lambda image, plain: (
        image - plain).abs().mean((1, 2, 3)).min() > STEP),
    'grayscale_prob': (['--grayscale-prob', '1'], lambda image, plain: torch.allclose(
        _colors(image), _colors(image)[:, :1].expand_as(image), atol=1e-3)),
    'gaussian_blur_prob': (['--gaussian-blur-prob', '1'], lambda image, plain: (
        _roughness(image) <= _roughness(plain)).all() and _roughness(image).mean() < 0.9 * _roughness(plain).mean()),
    'reprob': (['--reprob', '1'], lambda image, plain: 0.1 < (image != plain).float().mean() < 0.4),
    'remode': (['--reprob', '1', '--remode', 'const'], lambda image, plain: (
        torch.where((image == 0).all(1, keepdim=True), 0, plain) == image).all() and _erased(image).min() > 0),
    # half of the images are scaled by the area asked for, the others are taken whole
    'train_crop_mode': (['--train-crop-mode', 'rkrc', '--scale', '0.3', '0.3'], lambda image, plain: 2 <= sum(
        map(close, image, plain)) < 22),
    'aa': (['--aa', 'rand-m9-n1'], lambda image, plain: 2 <= sum(map(torch.equal, image, plain)) < 24),
}


@pytest.mark.parametrize('flag', CHANGED)
def test_images_are_changed_as_the_flag_says(build: Build, flag: str) -> None:
    flags, fits = CHANGED[flag]
    plain = images_of(build(*WHOLE))
    assert fits(images_of(build(*WHOLE, *flags)), plain)
    assert not fits(plain, plain)  # control


@pytest.mark.parametrize('count', ['1', '5'])
def test_how_many_boxes_are_erased(build: Build, count: str) -> None:
    erased = (images_of(build(*WHOLE, '--reprob', '1', '--remode', 'const', '--recount', count)) == 0).all(1)
    filled = erased.sum((1, 2)) == erased.any(1).sum(-1) * erased.any(2).sum(-1)  # one box and nothing beside it
    assert bool(filled.all()) is (count == '1')


@pytest.mark.parametrize('resplit', [False, True])
def test_splits_and_which_of_them_are_erased(build: Build, image_root: str, resplit: bool) -> None:
    prepared = build(*WHOLE, '--aug-splits', '2', '--reprob', '1', '--remode', 'const', *['--resplit'] * resplit)
    image = torch.stack([each for each, _ in prepared.take(0)])  # (6, 2 x 4, 3, 24, 24)
    first, second = image[:, :4].flatten(0, 1), image[:, 4:].flatten(0, 1)
    plain = batches_of(prepared, opened(image_root))
    assert close(torch.where(first == 0, plain, first), plain)
    assert close(first, plain) is resplit
    assert _erased(second).min() > 0


def is_mixup(prepared: Prepared, plain: torch.Tensor) -> bool:
    """Whether each image is a weighted mean of itself and its partner in the batch."""
    image, mine = taken(prepared), batches_of(prepared, plain)
    return close(image + pairs(image), mine + pairs(mine), 2.1) and not close(_nearest(image, mine), image, 1)


def _nearest(image: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """For each value of mixed images the nearer one of the two that it may be taken from."""
    return torch.where((image - mine).abs() < (image - pairs(mine)).abs(), mine, pairs(mine))


def is_cutmix(prepared: Prepared, plain: torch.Tensor) -> bool:
    """Whether each pixel is that of the image or of its partner."""
    image, mine = taken(prepared), batches_of(prepared, plain)
    return close(_nearest(image, mine), image) and not close(image, mine)


@pytest.mark.parametrize('flags, kind', [
    ('--mixup 1', is_mixup), ('--cutmix 1', is_cutmix),
    ('--mixup 1 --cutmix 1 --mixup-switch-prob 0', is_mixup),
    ('--mixup 1 --cutmix 1 --mixup-switch-prob 1', is_cutmix),
])
def test_mixing(build: Build, image_root: str, flags: str, kind: Callable[..., bool]) -> None:
    plain = opened(image_root)
    prepared = build(*WHOLE, *flags.split())
    assert kind(prepared, plain)
    assert not (is_cutmix if kind is is_mixup else is_mixup)(prepared, plain)
    target = prepared.take(0)[0][1]
    assert target.shape == (4, 3) and torch.allclose(target.sum(1), torch.ones(4))


def test_boxes_of_cutmix_keep_their_bounds(build: Build, image_root: str) -> None:
    prepared = build(*WHOLE, '--cutmix-minmax', '0.2', '0.3')
    replaced = (taken(prepared) - batches_of(prepared, opened(image_root))).abs().amax(1) > STEP / 2
    sides = torch.stack([replaced.any(1).sum(-1), replaced.any(2).sum(-1)])
    assert sides.min() >= 4 and sides.max() <= 7  # of 24


def test_each_element_may_be_mixed_in_its_own_way(build: Build) -> None:
    for mode, distinct in (('batch', 1), ('elem', 4)):
        images = [set() for _ in range(6)]
        prepared = build(*WHOLE, '--mixup', '1', '--mixup-mode', mode, '-b', '4')
        for found, (_, target) in zip(images, prepared.take(0), strict=True):
            found.update(round(float(row.max()), 4) for row in target if row.max() < 1)
        assert max(len({min(each, round(1 - each, 4)) for each in found}) for found in images) <= distinct
        assert (max(map(len, images)) > 1) is (mode == 'elem')


SHAPES: dict[str, tuple[tuple[str, ...], Callable[[list[list[tuple[int, int]]]], Any]]] = {
    # (images, side) of the batches of three epochs
    'batch_size': (('-b', '6'), lambda epochs: epochs == [[(6, 24)] * 4] * 3),
    'train_img_sizes': (SIZES, lambda epochs: {side for each in epochs for _, side in each} == {16, 24, 32}),
    'train_batch_sizes': (('--train-img-sizes', '16', '32', '--train-batch-sizes', '6', '2'), lambda epochs: {
        pair for each in epochs for pair in each} == {(6, 16), (2, 32)}),
    'train_size_probs': ((*SIZES, '--train-size-probs', '0', '1', '0'), lambda epochs: {
        side for each in epochs for _, side in each} == {24}),
    'train_size_schedule': (PROGRESSIVE, lambda epochs: [{side for _, side in each} for each in epochs] == [
        {16}, {24}, {32}]),
    'train_size_schedule_spread': ((*PROGRESSIVE, '--train-size-schedule-spread', '9'), lambda epochs: any(
        len({side for _, side in each}) > 1 for each in epochs)),
    'train_size_random_mix': ((*PROGRESSIVE, '--train-size-random-mix', '1'), lambda epochs: any(
        len({side for _, side in each}) > 1 for each in epochs)),
    'train_batches_per_epoch': ((*SIZES, '--train-batches-per-epoch', '3'), lambda epochs: [
        len(each) for each in epochs] == [3] * 3),
}


@pytest.mark.parametrize('flag', SHAPES)
def test_shapes_of_batches(build: Build, flag: str) -> None:
    flags, fits = SHAPES[flag]
    prepared = build(*flags)
    assert fits([[(len(image), image.shape[-1]) for image, _ in prepared.take(epoch)] for epoch in range(3)])


def test_the_seed_orders_the_images(build: Build) -> None:
    one, two = (_numbers(build('--seed', seed)) for seed in ('1', '2'))
    assert one != two and sorted(one) == sorted(two) == list(range(24))


def test_pinned_memory_is_asked_for(build: Build) -> None:
    assert [build(*flags).loader.loader.loader.pin_memory for flags in ([], ['--pin-mem'])] == [False, True]
