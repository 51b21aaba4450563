"""The parsers know every flag of timm's scripts, by name, default and meaning."""
import argparse
import copy
import importlib.metadata
import json
import os
import re
import runpy
from typing import Any

import pytest

from cpool_vision.engine.settings import train, validate

with open(os.path.join(os.path.dirname(__file__), '..', 'timm_flags.json'), encoding='utf-8') as file:
    FACTS = json.load(file)
# flags that differ from those of timm's scripts, with the reason; docs/flags.md lists them
DEVIATIONS: dict[str, dict[str, Any]] = {
    'decay_epochs': {'default': None},  # timm's factory then takes 90 for step, and a share of the epochs for wsd
}
PARSERS = {'train': train.build_parser, 'validate': validate.build_parser}


def type_of(action: argparse.Action) -> str | None:
    """Name of the type of the values; text is what a flag takes that names none."""
    if action.nargs == 0 or type(action).__name__ == 'ParseKwargs':
        return None
    return 'str' if action.type is None else getattr(action.type, '__name__', str(action.type))


def facts_of(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """The facts of a parser, in the form of timm_flags.json."""
    return {
        action.dest: {
            'dest': action.dest,
            'flags': sorted(action.option_strings),
            'kind': type(action).__name__.lstrip('_').replace('Action', ''),
            'nargs': action.nargs,
            'const': action.const,
            'default': action.default,
            'type': type_of(action),
            'choices': None if action.choices is None else list(action.choices),
        }
        for action in parser._actions if action.dest not in ('help', 'version')
    }


def differences(parser: argparse.ArgumentParser, facts: dict[str, Any]) -> list[str]:
    """Destinations of timm's flags that the parser lacks or defines differently."""
    mine = facts_of(parser)
    expected = {fact['dest']: {**fact, 'flags': sorted(fact['flags'])} for fact in facts['flags']}
    wrong = [dest for dest, fact in expected.items() if mine.get(dest) != fact]
    groups = [sorted(action.dest for action in group._group_actions) for group in parser._mutually_exclusive_groups]
    return wrong + [f'exclusive: {group}' for group in facts['exclusive'] if group not in groups]


def table(name: str) -> dict[str, Any]:
    """Facts of timm's script."""
    facts: dict[str, Any] = copy.deepcopy(FACTS[name])
    for fact in facts['flags']:
        if fact['type'] is None and fact['nargs'] != 0 and fact['kind'] != 'ParseKwargs':
            fact['type'] = 'str'
    return facts


def wanted(name: str) -> dict[str, Any]:
    """Facts of timm's script, with our deviations."""
    facts = table(name)
    for fact in facts['flags']:
        change = DEVIATIONS.get(fact['dest'], {})
        assert all(fact[field] != value for field, value in change.items())
        fact.update(change)
    return facts


@pytest.mark.parametrize('name', PARSERS)
def test_flags_equal_timm(name: str) -> None:
    assert len(FACTS[name]['flags']) > 50
    assert differences(PARSERS[name](), wanted(name)) == []


@pytest.mark.skipif('TIMM_SCRIPTS' not in os.environ, reason='set TIMM_SCRIPTS to a clone of timm')
@pytest.mark.parametrize('name', PARSERS)
def test_the_facts_are_those_of_timms_scripts(name: str) -> None:
    """timm's wheel lacks its scripts: this runs where their folder is named."""
    script = runpy.run_path(os.path.join(os.environ['TIMM_SCRIPTS'], f'{name}.py'))
    facts = table(name)
    assert differences(script['parser'], facts) == [each for each in ['config'] if 'config_parser' in script]
    assert set(facts_of(script['parser'])) - {fact['dest'] for fact in facts['flags']} == set()


@pytest.mark.parametrize('field, value', [
    ('default', 'another'), ('flags', ['--other']), ('nargs', 7), ('type', 'bytes'), ('choices', ['x']),
    ('kind', 'StoreFalse'), ('const', 'c'), ('dest', 'gone'),
])
def test_comparison_sees_a_change_in_every_field(field: str, value: Any) -> None:
    facts = wanted('train')
    facts['flags'][20][field] = value
    assert differences(PARSERS['train'](), facts) == [facts['flags'][20]['dest']]


def test_comparison_sees_a_missing_exclusive_group() -> None:
    assert differences(argparse.ArgumentParser(), {'flags': [], 'exclusive': [['a', 'b']]}) == [
        "exclusive: ['a', 'b']"]


@pytest.mark.parametrize('name', PARSERS)
def test_every_flag_is_explained(name: str) -> None:
    assert [action.dest for action in PARSERS[name]()._actions if not action.help] == []


@pytest.mark.parametrize('name', PARSERS)
def test_help_is_printable(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        PARSERS[name]().parse_args(['--help'])
    assert caught.value.code == 0
    assert '--model' in capsys.readouterr().out


def announced(text: str) -> set[str]:
    """Flags that a text about timm's scripts names in code."""
    return set(re.findall(r'`(--[a-z][a-z-]+)', text))


def test_no_flag_that_the_installed_timm_announces_is_missing() -> None:
    """The scripts are not part of timm's wheel; the changelog in its metadata names what they have gained."""
    text = str(importlib.metadata.metadata('timm').get_payload())
    known = {flag for build in PARSERS.values() for action in build()._actions for flag in action.option_strings}
    assert {'--stop-epoch', '--save-epochs', '--lr-decay-fn'} <= announced(text)
    assert announced(text) - known == set(), 'timm has flags that train.py and validate.py lack'


def test_a_new_flag_would_be_seen() -> None:
    assert announced('* `train.py`: `--brand-new N` and `--old`, --prose is none') == {'--brand-new', '--old'}


def test_names_of_the_newest_timm_are_understood() -> None:
    args = PARSERS['train']().parse_args(['--task', 'multilabel', '--multilabel-threshold', '0.3', '--loss', 'asl'])
    assert (args.task, args.threshold, args.loss_type) == ('multi_label', .3, 'asl')
