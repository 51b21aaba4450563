"""Generated text between two markers of a file."""
import difflib
import pathlib
import sys


def replace_between(text: str, begin: str, end: str, table: str) -> str:
    """`text` with `table` between the markers.

    Raises:
        ValueError: the markers are missing or there is more than one pair.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f'the file must hold {begin} and {end} once each, in this order')
    head, rest = text.split(begin)
    return f'{head}{begin}\n{table}\n{end}{rest.split(end)[1]}'


def write_between(path: pathlib.Path, begin: str, end: str, table: str) -> None:
    """Puts `table` between the markers of the file `path`; errors as in `replace_between`."""
    path.write_text(replace_between(path.read_text(encoding='utf-8'), begin, end, table), encoding='utf-8')


def print_difference(text: str, wanted: str, name: str) -> int:
    """Prints how `text` differs from `wanted`; returns 1 if it does, else 0."""
    sys.stdout.writelines(difflib.unified_diff(
        text.splitlines(keepends=True), wanted.splitlines(keepends=True), name, 'wanted', n=0))
    return int(text != wanted)
