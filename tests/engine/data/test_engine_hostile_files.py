"""Files in data sets that are no images, or not what they are called: no code, no hang, one line each."""
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from cpool_vision.cli import inspect as inspect_command
from cpool_vision.cli import validate as validate_command
from cpool_vision.data.augment_config import AugmentationError, read_config
from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data.label_file import read_label_file
from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.data.unreadable import Unreadable, UnreadableLog
from cpool_vision.engine.settings.train import LossSettings
from cpool_vision.engine.train.loss import resolve_weights
from cpool_vision.engine.validate.labels import read_real_labels, read_valid_labels

POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n'


@pytest.fixture
def ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever Pillow would start Ghostscript, which here makes a black image."""
    started: list[int] = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kwargs: started.append(1) or Image.core.new(
        'RGB', (8, 8)))
    monkeypatch.setattr(Image, 'ID', list(Image.ID))
    return started


@pytest.fixture
def copied(image_root: str, tmp_path: pathlib.Path) -> pathlib.Path:
    """The image folder, to be spoilt."""
    shutil.copytree(image_root, tmp_path / 'images')
    return tmp_path / 'images'


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_postscript_is_an_unreadable_image(
        dataset: str, copied: pathlib.Path, ghostscript: list[int], train_args: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / 'train' / 'cat' / '0.jpg'
    path.write_bytes(POSTSCRIPT)
    with Image.open(path) as image:  # control
        image.load()
    assert ghostscript
    ghostscript.clear()
    args = train_args('--data-dir', str(copied), '--dataset', dataset, '--num-classes', '3')
    found = data.build_dataset(args, Classes(3), 'train', True, 'RGB', None)
    bad = [index for index in range(len(found)) if 'jpg' in (found.filename(index) if not dataset else
                                                             found.samples[index][0])]
    assert len(bad) == 1
    with pytest.raises(Exception, match='cannot identify it as'):
        found[bad[0]]
    assert not ghostscript


def test_validation_counts_it(copied: pathlib.Path, ghostscript: list[int], monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    (copied / 'validation' / 'cat' / '0.jpg').write_bytes(POSTSCRIPT)
    flags = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0', '--device', 'cpu',
             '--pretrained', '--max-bad-samples', '1']
    monkeypatch.setattr('cpool_vision.engine.model.create_model', _fresh)
    assert validate_command.main([*flags, '--data-dir', str(copied)]) == 0
    assert json.loads(capsys.readouterr().out.partition('--result')[2])['unreadable'] == 1 and not ghostscript


def _fresh(name: str, **kwargs: Any) -> Any:
    import timm
    return timm.create_model(name, **{**kwargs, 'pretrained': False})


def test_pictures_of_the_command_line_are_decoded_alike(tmp_path: pathlib.Path, ghostscript: list[int],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'a.jpg').write_bytes(POSTSCRIPT)
    os.mkfifo(tmp_path / 'pipe.jpg')
    for name, words in (('a.jpg', 'cannot identify'), ('pipe.jpg', 'not a regular file')):
        assert inspect_command.main(['resnet_micro_cpool_32', str(tmp_path / name), '--json',
                                     str(tmp_path / 'o.json')]) == 2
        assert words in capsys.readouterr().err
    assert not ghostscript


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir], ids=['pipe', 'folder'])
def test_a_checkpoint_that_is_no_file_is_an_error_at_once(
        make: Callable[[pathlib.Path], None], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
        base_flags: list[str]) -> None:
    from cpool_vision.cli import train as train_command
    for name, flags in (('a.pth.tar', ['--resume', '{}']), ('a.safetensors', ['--initial-checkpoint', '{}']),
                        ('runs/x/last.pth.tar', ['--resume', 'auto', '--experiment', 'x']),
                        ('a.pth', ['--pretrained', '--pretrained-path', '{}'])):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        assert train_command.main([*base_flags, *(flag.format(path) for flag in flags)]) == 2
        error = capsys.readouterr().err
        assert name in error and 'Traceback' not in error


@pytest.mark.parametrize('name, read', [
    ('labels.txt', lambda path: read_valid_labels(path, 3)),
    ('real.json', lambda path: read_real_labels(path, ['a.png'], 3)),
    ('labels.csv', read_label_file),
    ('labels.jsonl', read_label_file),
    ('weights.txt', lambda path: resolve_weights(LossSettings(class_weights=path), Classes(3))),
    ('transforms.yaml', read_config),
    ('transforms.json', read_config),
])
def test_a_pipe_in_place_of_settings_is_an_error_at_once(
        name: str, read: Callable[[str], Any], tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match='cannot be read .not a regular file'):
        read(str(tmp_path / name))


def test_aliases_that_blow_up_are_no_pipeline(tmp_path: pathlib.Path) -> None:
    lines = ['a: &a [x, x, x, x, x, x, x, x, x, x]', *(
        f'{two}: &{two} [{", ".join([f"*{one}"] * 10)}]' for one, two in zip('abcdefgh', 'bcdefghi', strict=True))]
    (tmp_path / 'a.yaml').write_text('\n'.join(lines))
    with pytest.raises(AugmentationError, match='is not valid YAML .its aliases expand to more than'):
        read_config(str(tmp_path / 'a.yaml'))


def test_a_name_cannot_forge_a_line(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    class Names:
        names = ('cat/1\n7\tdog/2.png', 'cat/2.png')

        def __len__(self) -> int:
            return len(self.names)

        def filename(self, index: int, *_: Any) -> str:
            return self.names[index]

    log = UnreadableLog(Names(), 2)
    log.open(str(tmp_path))
    log.add([Unreadable(index, name, 'why') for index, name in enumerate(Names.names)])
    text = (tmp_path / 'unreadable.txt').read_text()
    assert text == '0\tcat/1\\n7\\tdog/2.png\n1\tcat/2.png\n' and 'cat/1\\n7' in caplog.text
    again = UnreadableLog(Names(), 2)
    again.open(str(tmp_path))
    assert again._listed == {0, 1}
