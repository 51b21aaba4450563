"""Tables of the flags of train.py and validate.py: default, part that uses them, test that covers them.

    python -m benchmarks.flags_table            # print
    python -m benchmarks.flags_table --write    # between the markers in docs/flags.md
    python -m benchmarks.flags_table --check    # exit status 1 if docs/flags.md holds other tables

Flags and defaults come from the parsers, parts and tests from tests/engine/flag_cases.json. Flags of validate.py that
are not listed there share parser, code and test with those of train.py.
"""
import json
import pathlib
import sys
from typing import Any

from cpool_vision.engine.settings import train, validate

from .markers import run_command

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs' / 'flags.md'
CASES = ROOT / 'tests' / 'engine' / 'flag_cases.json'
PARSERS = {'train': train.build_parser, 'validate': validate.build_parser}


def read_cases() -> dict[str, dict[str, Any]]:
    """Cases of both commands by the destination of the flag, with the `test` of each."""
    content = json.loads(CASES.read_text(encoding='utf-8'))
    return {'train': content['train'], 'validate': {**content['train'], **content['validate']}}


def format_table(command: str) -> str:
    """Markdown table of the flags of a command; '-' where no part or test is listed."""
    cases = read_cases()[command]
    lines = ['| flag | default | part | test in tests/engine |', '|---|---|---|---|']
    for action in PARSERS[command]()._actions:
        if action.dest in ('help', 'version'):
            continue
        case = cases.get(action.dest, {})
        names = ', '.join(f'`{flag}`' for flag in action.option_strings) or f'`{action.metavar}`'
        default = '' if action.default in (None, '', {}) else f'`{json.dumps(action.default)}`'
        test = f'`{case["test"]}`' if 'test' in case else '-'
        lines.append(f'| {names} | {default} | {case.get("part", "-")} | {test} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints, writes or checks the tables; returns the exit status."""
    return run_command(argv, __doc__, DOCS, lambda: {f'{command}-flags': format_table(command) for command in PARSERS})


if __name__ == '__main__':
    sys.exit(main())
