"""Generated text between two markers of a file."""
import argparse
import difflib
import pathlib
import sys
from collections.abc import Callable


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


def run_command(
        argv: list[str] | None, description: str | None, default: pathlib.Path,
        make_tables: Callable[[], dict[str, str]],
) -> int:
    """The command of generated tables: prints them, writes them into a file, or compares them with those in it.

    Args:
        argv: arguments of the command line: `--write` or `--check`, `--file`.
        description: for `--help`.
        default: the file unless one is named.
        make_tables: gives the text by the name of its markers, `<!-- NAME -->` and `<!-- /NAME -->`; called once the
            arguments are known to be good.

    Returns:
        The exit status: 1 if `--check` finds a difference.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--write', action='store_true', help='write into the file')
    mode.add_argument('--check', action='store_true', help='compare with what the file holds')
    parser.add_argument('--file', type=pathlib.Path, default=default, help=f'file with the markers ({default.name})')
    args = parser.parse_args(argv)
    tables = make_tables()
    if not (args.write or args.check):
        print('\n\n'.join(tables.values()))
        return 0
    text = wanted = args.file.read_text(encoding='utf-8')
    for name, table in tables.items():
        wanted = replace_between(wanted, f'<!-- {name} -->', f'<!-- /{name} -->', table)
    if args.write:
        args.file.write_text(wanted, encoding='utf-8')
        return 0
    return print_difference(text, wanted, str(args.file))
