"""Images and folders that others made."""
import io
import os
import pathlib
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder

from cpool_vision.data import folders, images

POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n'


def picture(path: pathlib.Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)).save(path)


@pytest.mark.parametrize('name', images.FORMATS)
def test_the_named_formats_are_decoded(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'image'
    Image.new('RGB', (6, 5), (255, 0, 0)).save(path, name)
    for source in (str(path), path, io.BytesIO(path.read_bytes())):
        image = images.open_image(source)
        assert image.size == (6, 5) and image.mode == 'RGB'
    assert images.open_image(path, 'L').mode == 'L'


@pytest.mark.parametrize('name', ['eps', 'ico', 'tga', 'pcx', 'sgi', 'icns', 'pdf'])
def test_other_formats_are_refused_whatever_they_are_called(
        name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kwargs: started.append(1) or Image.core.new(
        'RGB', (8, 8)))
    path = tmp_path / f'a.{name}'
    path.write_bytes(POSTSCRIPT) if name == 'eps' else Image.new('RGB', (32, 32)).save(path)
    shutil.copy(path, tmp_path / 'a.jpg')
    with pytest.raises(OSError, match='cannot identify it as JPEG, PNG, .* or PPM'):
        images.open_image(tmp_path / 'a.jpg')
    assert not started
    if name == 'eps':  # control: Pillow itself starts it
        Image.open(tmp_path / 'a.jpg').load()
        assert started


def test_readers_of_others_know_the_same_formats(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, 'ID', list(Image.ID))
    (tmp_path / 'a.jpg').write_bytes(POSTSCRIPT)
    picture(tmp_path / 'b.png')
    with Image.open(tmp_path / 'a.jpg') as image:  # control
        assert image.format == 'EPS'
    images.guard_images(object())
    with pytest.raises(OSError, match='cannot identify'):
        Image.open(tmp_path / 'a.jpg')
    assert Image.open(tmp_path / 'b.png').size == (5, 6)


def test_sizes_are_bounded_before_anything_is_decoded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 2, 0, 0, 0)
    (tmp_path / 'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(
        b'IEND', b''))
    with pytest.raises(Image.DecompressionBombError):
        images.open_image(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)  # as some programs set it
    with pytest.raises(ValueError, match='20000 x 20000 pixels are more than 178956970'):
        images.open_image(tmp_path / 'a.png')


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes and a deeper one, with names whose natural and plain orders differ."""
    root = tmp_path / 'tree'
    for index, name in enumerate(('a2/1.png', 'a2/10.png', 'a2/9.PNG', 'a10/x.jpg', 'a10/deep/c1/y.png', 'top.png')):
        picture(root / name, index)
    (root / 'a2' / 'notes.txt').write_text('no image')
    return root


def test_a_folder_is_read_as_by_timm_and_torchvision(tree: pathlib.Path) -> None:
    for options in ({}, {'class_map': {'a10': 4, 'c1': 1}}, {'input_key': '.jpg;.txt'}):
        ours, theirs = folders.FolderReader(str(tree), **options), ReaderImageFolder(str(tree), **options)
        assert ours.samples == theirs.samples and ours.class_to_idx == theirs.class_to_idx
        assert ours.filenames() == theirs.filenames() and ours.filenames(basename=True) == theirs.filenames(True)
        assert ours[0][0].read() == theirs[0][0].read()
    ours, theirs = folders.SafeImageFolder(str(tree)), ImageFolder(str(tree))
    assert ours.samples == theirs.samples and ours.classes == theirs.classes
    assert ours[0][0].tobytes() == theirs[0][0].tobytes()
    with pytest.raises(RuntimeError, match='no image'):
        folders.FolderReader(str(tree), {'other': 0})


def test_loops_are_entered_once_and_pipes_left_out(tree: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = folders.FolderReader(str(tree)).samples, folders.SafeImageFolder(str(tree)).samples
    (tree / 'a2' / 'loop').symlink_to(tree)
    (tree / 'a2' / 'again').symlink_to(tree / 'a2')
    (tree / 'a10' / 'deep' / 'up').symlink_to(tree / 'a10')
    os.mkfifo(tree / 'a2' / 'pipe.png')
    (tree / 'a2' / 'gone.png').symlink_to(tree / 'absent')
    assert folders.FolderReader(str(tree)).samples == plain[0]
    for words in ('pipe.png is not a regular', 'gone.png is not a regular', 'was already read by another path'):
        assert words in caplog.text
    assert len(folders.SafeImageFolder(str(tree)).samples) <= 2 * len(plain[1])  # each class walks for itself


def test_linked_folders_and_files_count(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'linked').mkdir()
    (tmp_path / 'linked' / 'cat').symlink_to(tree / 'a2')
    (tmp_path / 'linked' / 'dog').mkdir()
    (tmp_path / 'linked' / 'dog' / '1.jpg').symlink_to(tree / 'a10' / 'x.jpg')
    reader = folders.FolderReader(str(tmp_path / 'linked'))
    assert reader.filenames() == ['cat/1.png', 'cat/9.PNG', 'cat/10.png', 'dog/1.jpg']


def test_a_pipe_that_takes_the_place_of_an_image_does_not_hang(tree: pathlib.Path) -> None:
    reader = folders.FolderReader(str(tree))
    (tree / 'a2' / '1.png').unlink()
    os.mkfifo(tree / 'a2' / '1.png')
    with pytest.raises(OSError, match='not a regular file'):
        reader[reader.filenames().index('a2/1.png')]
