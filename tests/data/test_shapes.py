import hashlib
import pickle

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from cpool_vision.data import ShapesDataset, create_dataset, list_datasets
from cpool_vision.data.counter import CounterDraws
from cpool_vision.data.scene import OUTLINES, TEXTURES, render_scenes


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


@pytest.mark.parametrize('split, size, expected', [
    ('train', 32, '99e3cc63b21dc5a44c6ec85f1fd87a4fe397b696debeb30dd53d36aebd961622'),
    ('validation', 32, '801105f1b2498191c50dc62959ad1713471f2a4cfc3beef9ade6be9567bc6e47'),
    ('test', 32, '50c3d432262f35c64a57534faa75652a1bc6cc4c5c3c1f65dcaa705251f10a78'),
    ('train', 48, '6fe5d3a94bb9619691154d4b99fcf327baf1f274888a3a7fa67536ecac4bd829'),
])
def test_pictures_are_the_published_ones(split: str, size: int, expected: str) -> None:
    pixels = ShapesDataset(split, num_samples=40, image_size=size).pixels()
    assert pixels.shape == (40, size, size, 3) and pixels.dtype == np.uint8
    assert digest(pixels) == expected


def test_sample_does_not_depend_on_its_neighbors() -> None:
    whole = ShapesDataset('train', num_samples=300).pixels()
    assert np.array_equal(ShapesDataset('train', num_samples=7).pixels(), whole[:7])
    alone = ShapesDataset('train', num_samples=300)
    assert np.array_equal(alone._render(np.asarray([211]))[0], whole[211])
    assert not np.array_equal(whole[211], whole[201])


def test_set_too_large_to_keep_is_made_picture_by_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ShapesDataset('test', num_samples=30)
    monkeypatch.setattr('cpool_vision.data.shapes._CACHE_BYTES', 1)
    lazy = ShapesDataset('test', num_samples=30)
    assert np.array_equal(np.asarray(lazy[17][0]), kept.pixels()[17])
    assert lazy._pixels is None and kept._pixels is not None


def test_splits_and_seeds_share_no_picture() -> None:
    sets = [ShapesDataset(split, 400) for split in ('train', 'validation', 'test')]
    sets.append(ShapesDataset('train', 400, data_seed=1))
    digests = [digest(picture) for dataset in sets for picture in dataset.pixels()]
    assert len(set(digests)) == len(digests)


def test_items_are_labelled_images() -> None:
    dataset = ShapesDataset('validation', 25)
    assert len(dataset) == 25 and dataset.num_classes == 10
    image, target = dataset[13]
    assert isinstance(image, Image.Image) and image.mode == 'RGB' and image.size == (32, 32)
    assert target == 3 and type(target) is int
    assert dataset.class_to_idx['zigzag_disk'] == 3
    assert dataset[-1][1] == 4
    assert dataset.targets().tolist() == [target for _, target in dataset]
    assert ShapesDataset('val', 3, input_img_mode='L')[0][0].mode == 'L'
    assert dataset.filename(13) == 'validation/zigzag_disk/000013.png'
    assert dataset.filenames(basename=True)[1] == '000001.png'


def test_transforms_are_applied() -> None:
    dataset = ShapesDataset('val', 3, transform=np.asarray, target_transform=lambda target: target + 100)
    image, target = dataset[2]
    assert isinstance(image, np.ndarray) and target == 102


@pytest.mark.parametrize('index', [3, -4])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match='out of range for 3 samples'):
        ShapesDataset('val', 3)[index]


def test_label_is_what_is_drawn() -> None:
    # with every draw equal, only the label can change the picture: inside the outline and nowhere else
    index = np.zeros(10, np.int64)
    outline, texture = np.divmod(np.arange(10), len(TEXTURES))
    pictures = render_scenes(0, 0, index, outline, texture).astype(int)
    assert len({digest(picture) for picture in pictures}) == len(OUTLINES) * len(TEXTURES)
    changed = np.abs(pictures - pictures[:1]).max((0, 3)) > 0
    assert 0.02 < changed.mean() < 0.9


def test_scene_is_the_same_at_another_size() -> None:
    small = ShapesDataset('train', 60).pixels().astype(float)
    large = ShapesDataset('train', 60, image_size=64).pixels().astype(float)
    shrunk = large.reshape(60, 32, 2, 32, 2, 3).mean((2, 4))
    error = np.abs(shrunk - small).mean((1, 2, 3))
    other = np.abs(np.roll(shrunk, 1, 0) - small).mean((1, 2, 3))
    assert (error < 0.6 * other).all()


def test_draws_are_uniform_and_keyed() -> None:
    draws = CounterDraws(0, 0, np.arange(2000))
    values = draws.uniform(50)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.std() - 12 ** -0.5) < 0.005
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.02
    assert not np.array_equal(draws.uniform(50), values)
    assert np.array_equal(CounterDraws(0, 0, np.arange(1000, 2000)).uniform(50), values[1000:])
    assert not np.array_equal(CounterDraws(0, 1, np.arange(2000)).uniform(50), values)
    assert set(draws.integers(20, 10).ravel()) == set(range(10))
    assert draws.bytes(5).shape == (2000, 5)


def test_classes_cannot_be_told_from_color() -> None:
    dataset = ShapesDataset('train', 2000)
    means = dataset.pixels().reshape(200, 10, -1, 3).mean((2,))
    between = means.mean(0).std(0)
    within = means.std((0, 1)) / 200 ** 0.5
    assert (between < 3 * within).all()


@pytest.mark.parametrize('prefetcher', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_timm_loader(prefetcher: bool, workers: int) -> None:
    dataset = create_dataset('cpool/shapes', split='validation', num_samples=50)
    loader = timm.data.create_loader(
        dataset, input_size=(3, 32, 32), batch_size=20, num_workers=workers, use_prefetcher=prefetcher,
        device=torch.device('cpu'), persistent_workers=False, crop_pct=1.0,
    )
    images, targets = zip(*loader, strict=True)
    assert [len(batch) for batch in images] == [20, 20, 10]
    assert torch.cat(targets).tolist() == [i % 10 for i in range(50)]
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    expected = (torch.from_numpy(dataset.pixels()) / 255 - mean) / std
    torch.testing.assert_close(torch.cat(images).permute(0, 2, 3, 1), expected, atol=1e-5, rtol=1e-5)


def test_pickled_copy_is_equal() -> None:
    dataset = ShapesDataset('test', 11)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert np.array_equal(copy.pixels(), dataset.pixels())


def test_factory_takes_what_timm_train_passes() -> None:
    dataset = create_dataset(
        'cpool/shapes', root='nowhere', split='train', is_training=True, class_map='', download=False, batch_size=8,
        seed=7, repeats=0.0, input_img_mode='RGB', input_key=None, target_key=None, num_samples=20,
        trust_remote_code=False,
    )
    assert isinstance(dataset, ShapesDataset) and dataset.split == 'train'
    # a training seed changes no picture
    assert np.array_equal(dataset.pixels(), ShapesDataset('train', 20).pixels())


def test_factory_names_and_sizes() -> None:
    assert 'cpool/shapes' in list_datasets()
    assert create_dataset('cpool/shapes', num_samples=1).split == 'validation'
    assert create_dataset('Cpool/Shapes48', num_samples=1)[0][0].size == (48, 48)
    assert create_dataset('cpool/shapes', num_samples=1, image_size=40)[0][0].size == (40, 40)


def test_other_names_go_to_timm(tmp_path) -> None:
    for name in ('a', 'b'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / name / '0.png')
    dataset = create_dataset('', root=str(tmp_path), split='train', class_map='')
    assert isinstance(dataset, timm.data.ImageDataset) and len(dataset) == 2


@pytest.mark.parametrize('name, options, message', [
    ('cpool/shape', {}, "unknown dataset 'cpool/shape': choose one of cpool/shapes"),
    ('cpool/', {}, 'unknown dataset'),
    ('cpool/shapes', {'split': 'trian'}, "unknown split 'trian'.*test.*train.*validation"),
    ('cpool/shapes', {'num_samples': 0}, 'num_samples must be >= 1, got 0'),
    ('cpool/shapes', {'image_size': 4}, 'image_size must be between 8 and 1024, got 4'),
    ('cpool/shapes', {'data_seed': -1}, 'data_seed must be >= 0 .* got -1'),
    ('cpool/shapes', {'class_map': 'x.txt'}, 'class_map does not work with'),
    ('cpool/shapes64', {'image_size': 32}, "image_size=32 contradicts the name 'cpool/shapes64'"),
])
def test_bad_input(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_dataset(name, **options)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match='color'):
        create_dataset('cpool/shapes', color='red')
