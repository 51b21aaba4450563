"""The command that draws and times augmentations."""
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import augmentation
from cpool_vision.data.augment_config import TRANSFORMS, list_presets

TEXT = augmentation.DOCS.read_text(encoding='utf-8')


def test_sheet_has_a_row_per_pipeline(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'sheet.png'
    flags = ['light', 'cifar', '-o', str(path), '--size', '24', '--draws', '2', '--count', '2']
    assert augmentation.main(flags) == 0
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (4 * 44 + 4, 6 * 28 + 4, 3)
    tiles = [sheet[row * 44 + 20:row * 44 + 44, 4 + 28 * column:28 + 28 * column] for row in range(4)
             for column in range(6)]
    assert all(tile.std() > 3 for tile in tiles)
    assert len({tile.tobytes() for tile in tiles}) > 12
    again = tmp_path / 'again.png'
    augmentation.main([*flags[:3], str(again), *flags[4:]])
    assert again.read_bytes() == path.read_bytes()


def test_times(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new('RGB', (30, 20), 'red').save(tmp_path / 'a.png')
    docs = tmp_path / 'docs.md'
    docs.write_text(f'{augmentation.BEGIN}\n{augmentation.END}\n')
    monkeypatch.setattr(augmentation, 'DOCS', docs)
    monkeypatch.setattr(augmentation, 'ROOT', tmp_path)
    flags = ['light', '--time', '--images', str(tmp_path), '--size', '24', '--count', '3', '--rounds', '1', '--write']
    assert augmentation.main(flags) == 0
    table = capsys.readouterr().out.strip()
    rows = re.findall(r'^\| (\S.*?) \| (\d+\.\d\d) \| (\d+\.\d\d) \|$', table, re.MULTILINE)
    assert rows[0] == ('timm, default', '1.00', '1.00') and rows[-1][0] == '--aug-config light'
    assert table in docs.read_text()


def test_wrong_calls(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit):
        augmentation.main([])
    with pytest.raises(FileNotFoundError, match='holds no images'):
        augmentation.main(['-o', str(tmp_path / 'a.png'), '--images', str(tmp_path)])


def test_documentation_names_all_presets_and_transforms_are_counted() -> None:
    assert [name for name in list_presets() if f'| `{name}` |' not in TEXT] == []
    assert f'a list of {len(TRANSFORMS)} transforms' in TEXT
    assert all(f'| --aug-config {name} |' in TEXT for name in list_presets())


def test_documentation_names_tests_that_exist() -> None:
    source = (pathlib.Path(__file__).parent / 'test_augment.py').read_text(encoding='utf-8')
    names = set(re.findall(r'`(?:tests/data/test_augment\.py::)?(test_\w+)`', TEXT))
    assert len(names) > 4 and [name for name in names if f'def {name}(' not in source] == []
