"""Tables of the flags of train.py and validate.py: default and meaning, grouped as in `--help`.

    python -m benchmarks.flags_table            # print
    python -m benchmarks.flags_table --write    # between the markers in docs/flags.md
    python -m benchmarks.flags_table --check    # exit status 1 if docs/flags.md holds other tables

Everything comes from the parsers. `tests/engine/flag_cases.json` names the part that uses each flag and its test; flags
of validate.py that are not listed there share parser, code and test with those of train.py.
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
    """Markdown tables of the flags of a command, one for each group of its `--help`."""
    lines: list[str] = []
    for group in PARSERS[command]()._action_groups:
        actions = [action for action in group._group_actions if action.dest not in ('help', 'version')]
        if not actions:
            continue
        title = {'positional arguments': 'data folder', 'options': 'settings file and model'}.get(
            group.title or '', group.title or '')
        lines += ['', f'### {title[0].upper()}{title[1:]}', '', '| flag | default | meaning |', '|---|---|---|']
        for action in actions:
            names = ', '.join(f'`{flag}`' for flag in action.option_strings) or f'`{action.metavar}`'
            default = '' if action.default in (None, '', {}) else f'`{json.dumps(action.default)}`'
            meaning = (action.help or '').replace('%%', '%').replace('|', '\\|').replace('*', '\\*')
            lines.append(f'| {names} | {default} | {meaning} |')
    return '\n'.join(lines[1:])


def main(argv: list[str] | None = None) -> int:
    """Prints, writes or checks the tables; returns the exit status."""
    return run_command(argv, __doc__, DOCS, lambda: {f'{command}-flags': format_table(command) for command in PARSERS})


if __name__ == '__main__':
    sys.exit(main())
