"""The campaign of kills: which rounds it makes, what it keeps, what it says."""
import json
import pathlib
from typing import Any

import pytest

from benchmarks import kill_campaign
from benchmarks.kill_campaign import CONFIGURATIONS, campaign, make_table

ROW = {'kills': 2, 'early': 1, 'one_process': 0, 'half_written': 1, 'resumes': 1, 'damaged': 0, 'different': [],
       'failure': '', 'seconds': 1.}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Rounds that were asked for, none of which is run: configuration, kills, seed."""
    rounds: list[tuple[str, int, int]] = []

    def run_round(name: Any, kills: int, seed: int) -> dict[str, Any]:
        rounds.append((name, kills, seed))
        return {**ROW, 'kills': kills}

    monkeypatch.setattr(kill_campaign, 'prepare', lambda work, name: name)
    monkeypatch.setattr(kill_campaign, 'run_round', run_round)
    return rounds


def test_a_campaign_goes_on_from_its_results(tmp_path: pathlib.Path, asked: list[tuple[str, int, int]]) -> None:
    results = tmp_path / 'kills.json'
    assert campaign(tmp_path, results, 5, 2, ['single', 'NaFlex'])
    assert asked == [('single', 2, 0), ('NaFlex', 2, 0), ('single', 1, 1)]
    asked.clear()
    assert campaign(tmp_path, results, 9, 2, ['single', 'NaFlex'])
    assert asked == [('NaFlex', 2, 1), ('single', 2, 2)]
    assert campaign(tmp_path, results, 9, 2, ['single', 'NaFlex']) and len(asked) == 2
    rounds = json.loads(results.read_text())['rounds']
    assert [row['kills'] for row in rounds] == [2, 2, 1, 2, 2] and all(row['date'] for row in rounds)


@pytest.mark.parametrize('wrong', [{'different': ['last.pth.tar .epoch']}, {'failure': 'status 1'}])
def test_a_round_that_fails_ends_the_campaign(tmp_path: pathlib.Path, asked: Any, monkeypatch: pytest.MonkeyPatch,
                                              wrong: dict[str, Any]) -> None:
    monkeypatch.setattr(kill_campaign, 'run_round', lambda *_: {**ROW, **wrong})
    assert not campaign(tmp_path, tmp_path / 'kills.json', 9, 2, ['single'])
    content = json.loads((tmp_path / 'kills.json').read_text())
    assert len(content['rounds']) == 1
    assert '| single | 1 | 2 | 1 | 0 | 1 | 1 | 0 |' in make_table(tmp_path / 'kills.json')


def test_the_table_has_every_configuration(tmp_path: pathlib.Path) -> None:
    row = {**ROW, 'commit': 'abcdefgh', 'date': '2026-01-02T03:04:05'}
    (tmp_path / 'kills.json').write_text(json.dumps({
        'machine': {'torch': '2', 'cpu': 'a CPU'},
        'rounds': [{**row, 'configuration': name} for name in [*CONFIGURATIONS, 'single']]}))
    lines = make_table(tmp_path / 'kills.json').splitlines()
    assert len(lines) == len(CONFIGURATIONS) + 5 and lines[-1].startswith('2026-01-02, commit abcdefg,')
    count = len(CONFIGURATIONS) + 1
    assert lines[2] == '| single | 2 | 4 | 2 | 0 | 2 | 2 | 2 |'
    assert lines[-3] == f'| all | {count} | {2 * count} | {count} | 0 | {count} | {count} | {count} |'


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_a_round_of_kills_changes_nothing(tmp_path: pathlib.Path, name: str) -> None:
    row = kill_campaign.run_round(kill_campaign.prepare(tmp_path, name), 3, seed=0)
    assert (row['kills'], row['failure'], row['different']) == (3, '', [])
