"""Reading of files that others made."""
import os
import pathlib
import time

import pytest

from cpool_vision import reading

BOMB = '\n'.join(['a: &a [x, x, x, x, x, x, x, x, x, x]', *(
    f'{two}: &{two} [{", ".join([f"*{one}"] * 10)}]' for one, two in zip('abcdefgh', 'bcdefghi', strict=True))])


@pytest.mark.parametrize('text, words', [
    (BOMB, 'aliases expand to more than'),
    ('a: &a [*a]', 'refers to a node that contains it'),
    ('a: &a {b: *a}', 'refers to a node that contains it'),
    ('[' * 5000, 'nested too deeply'),
    ('a: [1', 'expected'),
    ('a: 2020-13-45', 'month'),
    ('x' * (reading.SETTINGS_BYTES + 1), 'larger than'),
    ('a: !!python/object/apply:os.mkdir [x]', 'could not determine a constructor'),
    ('? [a]\n: b', 'unhashable'),
])
def test_hostile_yaml_is_an_error_at_once(text: str, words: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'a.yaml'
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError, match=words):
        reading.read_yaml(path)
    assert time.process_time() - started < 5


def test_aliases_in_measure_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'a.yaml'
    path.write_text('base: &base {lr: 0.1}\nrun: {<<: *base, epochs: 3}\nmean: &m [0.5, 0.5]\nstd: *m\n')
    assert reading.read_yaml(path) == {
        'base': {'lr': .1}, 'run': {'lr': .1, 'epochs': 3}, 'mean': [.5, .5], 'std': [.5, .5]}


@pytest.mark.parametrize('content, words', [
    (b'[' * 100_000, 'nested too deeply'), (b'{', 'property name'), (b'\xff', 'utf-8'), (b'', 'Expecting value')])
def test_hostile_json_is_an_error(content: bytes, words: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'a.json'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        reading.read_json(path)


def test_only_regular_files_are_opened(tmp_path: pathlib.Path) -> None:
    pipe, link = tmp_path / 'pipe', tmp_path / 'link'
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path, pathlib.Path('/dev/zero')):
        with pytest.raises(OSError, match='not a regular file'):
            reading.open_regular(path)
    with pytest.raises(FileNotFoundError):
        reading.open_regular(tmp_path / 'absent')
    (tmp_path / 'file').write_bytes(b'abc')
    (tmp_path / 'other').symlink_to(tmp_path / 'file')
    with reading.open_regular(tmp_path / 'other') as file:
        assert file.read() == b'abc'


def test_names_take_one_line() -> None:
    assert reading.one_line('a\nb\r\tc\x1b[2Jd\u2028\x85') == r'a\nb\r\tc\x1b[2Jd\u2028\x85'
    assert reading.one_line('größe \udcff 日本.png') == 'größe \udcff 日本.png'
    assert reading.reason(OSError(2, 'No such\nfile', 'x')) == 'No such file'
    assert reading.reason(RecursionError()) == 'RecursionError'
