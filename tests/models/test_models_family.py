"""A family is one file: this one declares and registers another, for the tests alone."""
import pytest
import timm
import torch
from timm.models import register_model
from timm.models.vgg import VGG, ConvMlp
from torch import nn

from cpool_vision.layers import create_mixer, mixers
from cpool_vision.models._builder import build_variant, check_placed, variant_cfgs
from cpool_vision.models._family import Family, PoolConfig

FAMILY = Family('vgg', positions=('pool', 'head'), ratio=.3, groups=2, former_positions={'max': 'pool'})


class ContextPoolVGG(VGG):
    """VGG whose max-pools are context pools."""

    def __init__(self, *args, cpool=None, **kwargs):
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        for i, layer in enumerate(self.features):
            if 'pool' in cpool.positions and isinstance(layer, nn.MaxPool2d):
                dim = self.features[i - 2].out_channels
                self.features[i] = nn.Sequential()
                self.features[i].cpool = create_mixer(dim, stride=2, base=layer, **cpool.layer_args)
        if 'head' in cpool.positions:
            self.pre_logits = nn.Sequential(create_mixer(self.features[-3].out_channels, **cpool.layer_args),
                                            self.pre_logits)
        check_placed(self, cpool)


default_cfgs = variant_cfgs(bases={}, own={'vgg_pooled_32.untrained': dict(
    num_classes=4, input_size=(3, 32, 32), pool_size=(1, 1), first_conv='features.0', classifier='head.fc')})


@register_model
def vgg_pooled_32(pretrained=False, **kwargs):
    model_args = dict(cfg=[8, 'M', 16, 'M'], num_classes=4, mlp_ratio=.01)
    return build_variant(ContextPoolVGG, FAMILY, 'vgg_pooled_32', pretrained, **dict(model_args, **kwargs))


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('vgg_pooled_32', **kwargs).eval()


def test_defaults_are_those_of_the_file():
    model = make()
    assert [name for name, _ in mixers(model)] == ['features.2.cpool', 'features.5.cpool']
    assert {(pool.ratio, pool.groups) for _, pool in mixers(model)} == {(.3, 2)}
    assert model._model_args['cpool_positions'] == ['pool'] and 'cpool_stages' not in model._model_args
    assert isinstance(model.pre_logits, ConvMlp)


def test_keywords_positions_and_former_names_work():
    assert len(list(mixers(make(cpool_positions=['pool', 'head'])))) == 3
    assert [n for n, _ in mixers(make(cpool_positions='max'))] == [n for n, _ in mixers(make())]
    with pytest.raises(ValueError, match="unknown position 'stem' for vgg: choose from pool, head, or 'none'"):
        make(cpool_positions='stem')


def test_it_starts_as_its_base():
    plain, model = make(cpool_positions='none'), make(cpool_init='identity')
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    nn.init.ones_(model.features[2].cpool.gamma)
    assert not torch.allclose(model(x), plain(x))
