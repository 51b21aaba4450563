"""Real ImageNet weights of the package index; runs where they are installed (`pip install 'cpool_vision[real]'`)."""
import json

import pytest
import timm
import torch

from benchmarks import real_weights
from cpool_vision.hub import save_for_hub

needs_weights = pytest.mark.skipif(real_weights.package_file(0) is None, reason='weights are not installed')


@needs_weights
def test_a_variant_predicts_what_the_real_base_predicts(tmp_path):
    base = real_weights.load_base(0)
    save_for_hub(base, tmp_path / 'base')
    variant = real_weights.make_variant(tmp_path / 'base', 0)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        logits = base(images)
        assert torch.equal(variant(images), logits)
        assert not torch.allclose(timm.create_model('tf_efficientnet_lite0').eval()(images), logits, atol=.1)
        variant.blocks[4].cpool.gamma.fill_(1.)
        assert not torch.equal(variant(images), logits)
    config = json.loads((tmp_path / 'base' / 'config.json').read_text())
    assert config['architecture'] == 'tf_efficientnet_lite0' and config['num_classes'] == 1000


@needs_weights
def test_tensors_of_another_model_are_refused(monkeypatch):
    file = real_weights.package_file(0)
    monkeypatch.setattr(real_weights, 'package_file', lambda size: file)
    with pytest.raises(ValueError, match='does not hold the tensors of tf_efficientnet_lite2'):
        real_weights.load_base(2)


def test_absent_weights_are_named(monkeypatch):
    monkeypatch.setattr(real_weights, 'package_file', lambda size: None)
    with pytest.raises(FileNotFoundError, match='EfficientNet-Lite1 are not installed: pip install'):
        real_weights.load_base(1)
