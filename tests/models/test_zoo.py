"""Every released model loads from a clone and gives the logits that it gave when it was released."""
import json
from pathlib import Path

import pytest
import timm
import torch

from benchmarks import zoo

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


def test_cards_and_index_are_up_to_date() -> None:
    for folder in zoo.entries():
        assert (folder / 'README.md').read_text(encoding='utf-8') == zoo.card(folder)
    assert (zoo.MODELS / 'README.md').read_text(encoding='utf-8') == zoo.index()
    assert sorted(LOGITS) == [folder.name for folder in zoo.entries()]
    assert len(zoo.entries()) == sum(path.is_dir() for path in zoo.MODELS.iterdir())
