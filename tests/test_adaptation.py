"""The task in which supports follow objects: what is painted and scored, and that a study goes on where it stopped."""
import json

import pytest
import torch

from benchmarks import adaptation
from benchmarks.adaptation import (
    Painter,
    format_rows,
    make_pictures,
    objects_of,
    predicted_maps,
    run_study,
    score,
    train,
)


@pytest.fixture(scope='module')
def pictures():
    return make_pictures('train', 24)


def test_objects_are_painted_in_their_mean_color_and_the_ground_is_left_alone(pictures):
    inside = (pictures.radii > 0)[:, None].expand_as(pictures.images)
    assert torch.equal(pictures.painted[~inside], pictures.images[~inside])
    assert 0.02 < inside.float().mean() < 0.8
    for image, painted, radii in zip(*pictures, strict=True):
        for place in objects_of(torch.ones_like(radii) * (radii > 0), radii):
            assert painted[:, place].mean() == pytest.approx(image[:, place].mean().item(), abs=1e-4)


def test_a_net_that_paints_nothing_has_the_whole_error_left(pictures):
    net = Painter('identity').eval()
    left = score(net, pictures)
    assert left['objects'] == pytest.approx(100, abs=1e-3) and left['ground'] == pytest.approx(0, abs=1e-3)
    assert 'correlation' not in left
    with pytest.raises(TypeError, match="'identity' is none"):
        predicted_maps(net, pictures.images)


def test_mixers_start_from_the_same_features_and_learn(pictures, monkeypatch):
    monkeypatch.setattr(adaptation, 'STEPS', 4)
    nets = [train(mixer, 1, pictures) for mixer in ('context', 'context', 'layer')]
    for name, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[1].state_dict()[name]), name
    row = score(nets[0], pictures)
    assert row['support_objects'] > 0 and -1 <= row['correlation'] <= 1 and 0 <= row['widest_logits'] <= 16
    assert 'correlation' not in score(nets[2], pictures)


def test_a_study_repeats_no_finished_run(tmp_path, monkeypatch):
    for name, value in (('STEPS', 1), ('TRAIN', 16), ('SELECTION', 4), ('SEEDS', range(2))):
        monkeypatch.setattr(adaptation, name, value)
    kept = {'arm': 'one learned support', 'seed': 0, 'objects': 7., 'ground': 2., 'params': 1}
    (tmp_path / 'layer-s0.json').write_text(json.dumps(kept))
    rows = run_study(tmp_path)
    assert len(rows) == 4 and rows[1]['objects'] == 7.
    assert run_study(tmp_path) == rows
    table = format_rows(rows)
    assert table.count('\n') == 3 and '| one learned support | 2 |' in table


def test_the_command_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    for name, value in (('STEPS', 1), ('TRAIN', 16), ('SELECTION', 4)):
        monkeypatch.setattr(adaptation, name, value)
    file = tmp_path / 'a.png'
    assert adaptation.main(['-o', str(file), '--rows', '2']) == 0
    assert file.read_bytes()[:4] == b'\x89PNG' and 'correlation' in capsys.readouterr().out
