"""docs/flags.md is what the parsers say, and the tests that it names exist."""
import pathlib
import re

import pytest

from benchmarks import flags_table
from cpool_vision.engine.settings import train

TESTS = {path.name: set(re.findall(r'^def (test_\w+)', path.read_text(encoding='utf-8'), re.MULTILINE))
         for path in pathlib.Path(__file__).parents[1].rglob('test_*.py')}


def test_tables_are_current() -> None:
    assert flags_table.main(['--check']) == 0, 'run python -m benchmarks.flags_table --write'


def test_check_sees_another_table(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'flags.md'
    path.write_text(flags_table.DOCS.read_text(encoding='utf-8').replace('`--lr-base`', '`--lr-bass`'))
    assert flags_table.main(['--check', '--file', str(path)]) == 1
    assert '--lr-bass' in capsys.readouterr().out
    assert flags_table.main(['--write', '--file', str(path)]) == 0 == flags_table.main(['--check', '--file', str(path)])


@pytest.mark.parametrize('command', flags_table.PARSERS)
def test_each_flag_has_a_part_and_a_test_that_exists(command: str) -> None:
    cases = flags_table.read_cases()[command]
    wanted = {action.dest for action in flags_table.PARSERS[command]()._actions} - {'help', 'version'}
    assert wanted - set(cases) == set()
    for name in wanted:
        match = re.fullmatch(r'(test_\w+\.py)::(test_\w+)(\[\w+\])?', cases[name]['test'])
        assert match is not None and cases[name]['part']
        assert match[2] in TESTS[match[1]], cases[name]['test']


def test_cases_name_flags_of_the_parser() -> None:
    known = {action.dest for action in train.build_parser()._actions}
    assert set(flags_table.read_cases()['train']) <= known
