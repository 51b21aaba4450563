"""Every released model loads from a clone and gives the logits that it gave when it was released."""
import json
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml

from benchmarks import zoo
from benchmarks.markers import replace_between
from benchmarks.model_table import count
from benchmarks.results import DEPTHWISE, PLAIN, POOL, arm_name, changed_settings
from cpool_vision.cli import inspect, validate
from cpool_vision.engine.settings import train
from cpool_vision.engine.settings.config import parse_args

LOGITS = json.loads(zoo.LOGITS.read_text(encoding='utf-8'))
# fp32 sums in another order, as other processors and backends make them
TOLERANCE = {'atol': 2e-4, 'rtol': 2e-4}


@pytest.fixture(params=zoo.entries(), ids=lambda folder: folder.name)
def entry(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_logits_are_those_of_the_release(entry: Path) -> None:
    wanted = torch.tensor(LOGITS[entry.name])
    assert wanted.std() > .5 and wanted.std(dim=0).max() > .1  # logits that tell nothing would be met by anything
    torch.testing.assert_close(zoo.reference_logits(entry), wanted, **TOLERANCE)


def test_a_slip_of_one_weight_in_a_thousand_is_seen(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model

    def worse(*args, **kwargs):
        model = create_model(*args, **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[::1000] *= 1.1
        return model

    monkeypatch.setattr(timm, 'create_model', worse)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(zoo.reference_logits(entry), torch.tensor(LOGITS[entry.name]), **TOLERANCE)


def test_entries_are_small_and_complete(entry: Path) -> None:
    assert (entry / 'model.safetensors').stat().st_size < 5e6
    assert {path.name for path in entry.iterdir()} == {
        'README.md', 'config.json', 'model.safetensors', 'release.json', 'supports.png'}
    facts = json.loads((entry / 'release.json').read_text(encoding='utf-8'))
    assert facts['model'] == json.loads((entry / 'config.json').read_text(encoding='utf-8'))['architecture']


def test_the_printed_command_gives_the_settings_and_the_size_of_the_entry(entry: Path) -> None:
    facts = json.loads((entry / 'release.json').read_text(encoding='utf-8'))
    _, script, *argv = shlex.split(facts['command'].replace('\\\n', ' '))
    args = parse_args(train.build_parser, argv)
    assert script == 'train.py' and args.model == facts['model']
    assert changed_settings(vars(args)) == facts['settings']
    _, params, macs = count(args.model, num_classes=10, **args.model_kwargs)
    assert (params, macs) == (facts['params'], facts['macs'])


def test_the_command_of_the_twins_gives_their_sizes(entry: Path) -> None:
    facts = json.loads((entry / 'release.json').read_text(encoding='utf-8'))
    twins = facts.get('twins', {'rows': []})
    assert 'twins' not in facts or {row['arm'] for row in twins['rows']} == {PLAIN, POOL, DEPTHWISE}
    for row in twins['rows']:
        keywords = [f'{key}={value}' for key, value in row['model_kwargs'].items()]
        argv = shlex.split(twins['command'])[2:] + (['--model-kwargs', *keywords] if keywords else [])
        args = parse_args(train.build_parser, argv)
        assert args.model == facts['model'] and args.epochs == twins['epochs']
        assert count(args.model, num_classes=10, **args.model_kwargs)[1:] == (row['params'], row['macs'])
        assert arm_name(args.model_kwargs) == row['arm']


def test_transformers_reads_every_entry(entry: Path) -> None:
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForImageClassification.from_pretrained(entry).eval()
    images = zoo.reference_images(32, 32)
    expected = timm.create_model(f'local-dir:{entry}', pretrained=True).eval()(images)
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_our_commands_read_every_entry(entry: Path, tmp_path: Path) -> None:
    name = f'local-dir:{entry}'
    assert validate.main(['--model', name, '--pretrained', '--dataset', 'cpool/shapes', '--num-samples', '8', '-b', '8',
                          '--workers', '0', '--device', 'cpu']) == 0
    assert inspect.main([name, '--json', str(tmp_path / 'numbers.json'), '--num-images', '1']) == 0


def test_the_front_matter_of_cards_is_that_of_the_hub(entry: Path) -> None:
    _, front, _ = (entry / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    facts = yaml.safe_load(front)
    assert facts['library_name'] == 'timm' and facts['pipeline_tag'] == 'image-classification'
    assert facts['license'] == 'apache-2.0' and 'timm' in facts['tags']


def test_cards_and_index_are_up_to_date() -> None:
    for folder in zoo.entries():
        assert (folder / 'README.md').read_text(encoding='utf-8') == zoo.card(folder)
    assert (zoo.MODELS / 'README.md').read_text(encoding='utf-8') == zoo.index()
    page = zoo.RESULTS.read_text(encoding='utf-8')
    assert page == replace_between(page, '<!-- twins -->', '<!-- /twins -->', zoo.results_table())
    assert sorted(LOGITS) == [folder.name for folder in zoo.entries()]
    assert len(zoo.entries()) == sum(path.is_dir() for path in zoo.MODELS.iterdir())
