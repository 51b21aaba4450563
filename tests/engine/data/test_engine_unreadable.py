"""Training images that cannot be decoded: replaced, listed, capped."""
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from loader_tools import CASES, Build, same, unreadable_images
from PIL import Image
from process_tools import in_processes
from timm.data import ImageDataset

from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data.unreadable import StrictImageDataset, Unreadable, UnreadableLog, refuse_unreadable
from cpool_vision.errors import DatasetError


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
    report = unreadable_images(one.loader)
    assert [(image.index, image.path[-9:]) for image in report] == [(3, 'cat/3.png'), (8, 'dog/0.png')]
    assert 'identify' in report[0].reason and report[1].reason
    assert [image.index for image in unreadable_images(two.loader)] == [3, 8]
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
    assert data.share_unreadable(prepared.loader) == 2
    assert sorted(os.listdir(tmp_path)) == ['broken', 'unreadable.txt']


@pytest.mark.parametrize('workers', [0, 1])
def test_a_set_without_readable_images_ends_the_run(
        build: Build, image_root: str, tmp_path: Path, workers: int) -> None:
    for label in ('cat', 'dog', 'owl'):
        folder = tmp_path / 'train' / label
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f'{number}.png').write_bytes(b'garbage')
    with pytest.raises(DatasetError, match='no readable image was found to replace'):
        build('--data-dir', str(tmp_path), '--max-bad-samples', '1000', workers=workers).take(0)


def test_faults_of_a_transform_are_not_taken_for_unreadable_images(build: Build) -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        raise OSError('of the transform')

    prepared = build()
    prepared.loader.dataset.set_transforms([transform])
    with pytest.raises(OSError, match='of the transform'):
        prepared.take(0)


def share(image_root: str, folder: Path, rank: int) -> list[int]:
    log = UnreadableLog(StrictImageDataset(ImageDataset(os.path.join(image_root, 'train'))), 10)
    log.open(str(folder) if rank == 0 else '')
    before = log.share()
    log.add([Unreadable(index, str(index), '') for index in ([8], [3, 17])[rank]])
    return [before, log.share()]


def test_the_first_process_lists_what_all_found(image_root: str, tmp_path: Path) -> None:
    (tmp_path / 'run').mkdir()
    assert in_processes(2, tmp_path, partial(share, image_root, tmp_path / 'run')) == [[0, 3], [0, 3]]
    assert (tmp_path / 'run' / 'unreadable.txt').read_text() == '3\tcat/3.png\n8\tdog/0.png\n17\towl/1.png\n'


def test_file_names_that_are_no_text_are_listed(tmp_path: Path) -> None:
    class Named:
        def __len__(self) -> int:
            return 9

        def filename(self, index: int) -> str:
            return os.fsdecode(b'caf\xe9.png')

    for index in (4, 2):
        log = UnreadableLog(Named(), 1)
        log.open(str(tmp_path))
        log.add([Unreadable(index, 'x', '')])
    assert (tmp_path / 'unreadable.txt').read_bytes() == b'2\tcaf\xe9.png\n4\tcaf\xe9.png\n'


def test_refusing_unreadable_validation_images(image_root: str, caplog: pytest.LogCaptureFixture) -> None:
    dataset = StrictImageDataset(ImageDataset(os.path.join(image_root, 'train')))
    refuse_unreadable(dataset, [], 24)
    text = '6 of 24 images cannot be read: cat/0.png, cat/1.png, cat/2.png, cat/3.png, cat/4.png and 1 more'
    with pytest.raises(DatasetError, match=f'{text}; restore or remove'):
        refuse_unreadable(dataset, list(range(6)), 24, 5)
    refuse_unreadable(dataset, list(range(6)), 24, 0.25)
    assert f'{text}; they are left out' in caplog.text
