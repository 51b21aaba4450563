import hashlib

import numpy as np
import pytest
from PIL import Image

from cpool_vision.data import create_dataset
from cpool_vision.data.scene import OUTLINES, TEXTURES
from cpool_vision.data.shapes_seg import ShapesSegDataset


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize('split, size, pixels, masks', [
    ('train', 64, '583e5fe1e472a307', '2a69e0753732a1bc'),
    ('validation', 48, '372718ea2d979d15', '5163bde111ce422f'),
])
def test_pictures_are_the_published_ones(split: str, size: int, pixels: str, masks: str) -> None:
    crowd = ShapesSegDataset(split, 12, size).arrays()
    assert crowd.pixels.shape == (12, size, size, 3) and crowd.masks.shape == crowd.radii.shape == (12, size, size)
    assert crowd.pixels.dtype == crowd.masks.dtype == np.uint8 and crowd.radii.dtype == np.float32
    assert (digest(crowd.pixels), digest(crowd.masks)) == (pixels, masks)


def test_sample_does_not_depend_on_its_neighbors() -> None:
    dataset = ShapesSegDataset('train', 30, 32)
    whole, alone = dataset.arrays(), dataset.render(np.asarray([17]))
    for many, one in zip(whole, alone, strict=True):
        assert np.array_equal(many[17], one[0])
    assert not np.array_equal(whole.pixels[17], whole.pixels[16])


def test_splits_and_seeds_share_no_picture() -> None:
    sets = [ShapesSegDataset(split, 20, 16) for split in ('train', 'validation', 'test')]
    sets.append(ShapesSegDataset('train', 20, 16, data_seed=1))
    digests = [digest(picture) for dataset in sets for picture in dataset.arrays().pixels]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize('size_range, low, high', [(1, 8, 8), (4, 4, 16), (8, 2.8, 22.7)])
def test_radii_have_the_range_asked_for(size_range: float, low: float, high: float) -> None:
    crowd = ShapesSegDataset('train', 60, 64, size_range=size_range).arrays()
    radii = crowd.radii[crowd.masks > 0]
    assert radii.min() >= 0.99 * low and radii.max() <= 1.01 * high
    assert radii.max() / radii.min() >= 0.9 * size_range
    assert ((crowd.radii > 0) == (crowd.masks > 0)).all()


def test_masks_have_the_area_of_their_outlines() -> None:
    # objects of one size that do not touch the border or each other: the area of a disc, or of a triangle
    crowd = ShapesSegDataset('train', 80, 64, mean_radius=6, size_range=1, objects=1).arrays()
    inner = crowd.masks[:, 1:-1, 1:-1]
    whole = (crowd.masks > 0).sum((1, 2)) == (inner > 0).sum((1, 2))
    area, kind = (crowd.masks > 0).sum((1, 2))[whole], crowd.masks.max((1, 2))[whole]
    disc = kind <= 3
    assert disc.any() and (~disc).any()
    # radius .95 r with an aspect of .85 to 1; a triangle with an inradius of .65 r
    assert 0.8 * 102 < area[disc].mean() < 102
    assert 0.8 * 79 < area[~disc].mean() < 79


def test_sizes_change_nothing_else() -> None:
    one, many = (ShapesSegDataset('train', 40, 32, size_range=r).arrays() for r in (1, 8))
    ground = (one.masks == 0) & (many.masks == 0)
    same = (np.abs(one.pixels.astype(int) - many.pixels).max(-1) <= 2)[ground].mean()
    assert same > 0.8
    for a, b in zip(one.masks, many.masks, strict=True):
        assert set(np.unique(b)) - {0} <= set(np.unique(a))


def test_scene_is_the_same_at_another_size() -> None:
    small, large = (ShapesSegDataset('train', 20, size).arrays() for size in (32, 64))
    coarse = large.masks[:, ::2, ::2]
    assert (coarse == small.masks).mean() > 0.95
    assert np.allclose(small.radii.max((1, 2)) * 2, large.radii.max((1, 2)))


def test_mask_is_what_is_drawn() -> None:
    # inside an object its own two colors, and nothing of the ground: the picture changes at the border of the mask
    crowd = ShapesSegDataset('train', 60, 64).arrays()
    gray = crowd.pixels.astype(float).mean(-1)
    step = np.abs(np.diff(gray, axis=2))
    border = np.diff((crowd.masks > 0).astype(int), axis=2) != 0
    away = ~(border | (crowd.masks[:, :, 1:] > 0))
    assert step[border].mean() > 2 * step[away].mean()


def test_items_and_classes() -> None:
    dataset = create_dataset('cpool/shapes-seg', split='val', num_samples=5, batch_size=8, input_img_mode='RGB')
    assert isinstance(dataset, ShapesSegDataset) and len(dataset) == 5 and dataset.image_size == 64
    image, mask = dataset[-1]
    assert isinstance(image, Image.Image) and image.mode == 'RGB' and mask.mode == 'L' and mask.size == (64, 64)
    assert dataset.num_classes == 1 + len(OUTLINES) * 3 and dataset.classes[1] == f'{TEXTURES[0]}_disk'
    large = create_dataset('cpool/shapes-seg128', num_samples=1, transform=np.asarray, target_transform=np.asarray)
    assert large[0][0].shape == (128, 128, 3) and set(np.unique(large[0][1])) <= set(range(7))
    with pytest.raises(IndexError, match='index 5 is out of range for 5 samples'):
        dataset[5]


@pytest.mark.parametrize('options, message', [
    ({'split': 'trian'}, "unknown split 'trian' of cpool/shapes-seg"),
    ({'num_samples': 0}, 'num_samples must be >= 1, got 0'),
    ({'image_size': 8}, 'image_size must be between 16 and 1024, got 8'),
    ({'size_range': 0.5}, 'size_range must be between 1 .* got 0.5'),
    ({'mean_radius': 60}, 'mean_radius must be between 1 and 32 .* got 60'),
    ({'objects': 0}, 'objects must be between 1 and 16, got 0'),
    ({'data_seed': -1}, 'data_seed must be >= 0 .* got -1'),
    ({'input_img_mode': 'L'}, 'RGB images only'),
])
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_dataset('cpool/shapes-seg', **options)
