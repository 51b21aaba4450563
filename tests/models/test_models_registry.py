import dataclasses
import functools
import subprocess
import sys

import pytest
import timm
import torch
from models_testing import POSITIONS
from timm.models import get_pretrained_cfg

import cpool_vision
from cpool_vision.__main__ import main as run_script
from cpool_vision.layers import mixers
from cpool_vision.models._builder import pool_keys

BASES = {
    'convnext_atto_cpool': 'convnext_atto',
    'convnext_base_cpool': 'convnext_base',
    'convnext_nano_cpool': 'convnext_nano',
    'convnext_small_cpool': 'convnext_small',
    'convnext_tiny_cpool': 'convnext_tiny',
    'efficientnet_b0_cpool': 'efficientnet_b0',
    **{f'naflexvit_base_cpool_patch16_{kind}': f'naflexvit_base_patch16_{kind}'
       for kind in ('gap', 'par_gap', 'parfac_gap')},
    'poolformer_s12_cpool': 'poolformer_s12',
    'poolformer_s24_cpool': 'poolformer_s24',
    'poolformer_s36_cpool': 'poolformer_s36',
    'poolformerv2_s12_cpool': 'poolformerv2_s12',
    'poolformerv2_s24_cpool': 'poolformerv2_s24',
    'resnet101_cpool': 'resnet101',
    'resnet18_cpool': 'resnet18',
    'resnet34_cpool': 'resnet34',
    'resnet50_cpool': 'resnet50',
    'swin_base_cpool_patch4_window7_224': 'swin_base_patch4_window7_224',
    'swin_small_cpool_patch4_window7_224': 'swin_small_patch4_window7_224',
    'swin_tiny_cpool_patch4_window7_224': 'swin_tiny_patch4_window7_224',
    **{f'tf_efficientnet_lite{n}_cpool': f'tf_efficientnet_lite{n}' for n in (0, 1, 2)},
    'vit_base_cpool_patch16_224': 'vit_base_patch16_224',
    'vit_small_cpool_patch16_224': 'vit_small_patch16_224',
    'vit_tiny_cpool_patch16_224': 'vit_tiny_patch16_224',
}
MICRO = {
    'convnext_micro_cpool_32': 'convnext',
    'naflexvit_micro_cpool_patch4_gap': 'naflexvit',
    'poolformer_micro_cpool_32': 'metaformer',
    'resnet_micro_cpool_32': 'resnet',
    'swin_micro_cpool_patch2_window4_32': 'swin_transformer',
    'vit_micro_cpool_patch4_32': 'vision_transformer',
}
DEPTHS = {
    f'vit_{size}_cpool_d{depth}_patch16_224': (f'vit_{size}_patch16_224', depth)
    for size in ('small', 'base') for depth in (6, 8, 9, 10)}
PREFIXES = {
    'convnext': 'convnext', 'efficientnet': 'efficientnet', 'tf': 'efficientnet', 'naflexvit': 'naflexvit',
    'poolformer': 'metaformer', 'poolformerv2': 'metaformer',
    'resnet18': 'resnet', 'resnet34': 'resnet', 'resnet50': 'resnet', 'resnet101': 'resnet',
    'swin': 'swin_transformer', 'vit': 'vision_transformer'}
FAMILY = dict(MICRO, **{name: PREFIXES[name.split('_')[0]] for name in BASES})


def meta_model(name, **kwargs):
    return timm.create_model(name, device='meta', **kwargs)


@functools.cache
def everywhere(name):
    """A variant with a pool at every position, in bfloat16."""
    positions = [p for p in POSITIONS[FAMILY[name]] if (name, p) != ('resnet_micro_cpool_32', 'stem')]
    positions = [p for p in positions if p != 'pre_kv']  # takes the place of pre_attn
    return meta_model(name, cpool_positions=positions, cpool_init='identity', dtype=torch.bfloat16)


def share_of_pools(model):
    """Parameters of the pools over those of the base."""
    pools = pool_keys(model)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    mine = sum(size for key, size in sizes.items() if key in pools)
    return mine / (sum(sizes.values()) - mine)


def test_the_zoo_is_listed():
    assert sorted(timm.list_models('*cpool*')) == sorted([*BASES, *MICRO, *DEPTHS, 'naflexvit_small_cpool_patch16_gap'])
    assert cpool_vision.list_models() == timm.list_models('*cpool*')
    assert cpool_vision.list_models('vit_*cpool*') == timm.list_models('vit_*cpool*')


@pytest.mark.parametrize('name', sorted(BASES))
def test_the_variant_adds_keys_to_its_base_and_changes_none(name):
    base = timm.create_model(BASES[name], device='meta').state_dict()
    model = meta_model(name, cpool_init='identity')
    own = model.state_dict()
    assert set(own) - set(base) == pool_keys(model) != set()
    assert not set(base) - set(own)
    assert {k: v.shape for k, v in base.items()} == {k: own[k].shape for k in base}
    assert 0 < share_of_pools(model) <= .05


@pytest.mark.parametrize('name', {family: name for name, family in FAMILY.items() if name in BASES}.values())
def test_without_positions_a_variant_is_its_base(name):
    plain = meta_model(name, cpool_positions='none')
    assert list(plain.state_dict()) == list(timm.create_model(BASES[name], device='meta').state_dict())
    assert not list(mixers(plain))


@pytest.mark.parametrize('name', sorted(DEPTHS))
def test_depth_variants_are_their_base_cut_short(name):
    base, depth = DEPTHS[name]
    model = meta_model(name)
    assert len(model.blocks) == depth and len(list(mixers(model))) == depth
    expected = meta_model(base, depth=depth).state_dict()
    plain = meta_model(name, cpool_positions=[]).state_dict()
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in expected.items()}
    assert not get_pretrained_cfg(name).has_weights and get_pretrained_cfg(name).input_size == (3, 224, 224)


@pytest.mark.parametrize('name', sorted(FAMILY))
def test_pools_cost_at_most_five_percent_of_the_parameters(name):
    assert 0 < share_of_pools(everywhere(name)) <= .05


@pytest.mark.parametrize('name', sorted(MICRO))
def test_small_variants_fit_in_five_megabytes(name):
    model = meta_model(name)
    assert model.num_classes == 10 and 0 < share_of_pools(model) <= .05
    assert sum(t.numel() * t.element_size() for t in model.state_dict().values()) < 5e6 - 20e3


@pytest.mark.parametrize('name', sorted(BASES))
def test_pretrained_cfgs_are_those_of_the_base(name):
    base_tags = [n.partition('.')[2] for n in timm.list_models(BASES[name], include_tags=True)]
    tags = [n.partition('.')[2] for n in timm.list_models(name, include_tags=True)]
    assert sorted(tags) == sorted(base_tags) and tags
    for tag in ['', *tags]:
        ours = dataclasses.asdict(get_pretrained_cfg(f'{name}.{tag}' if tag else name))
        theirs = dataclasses.asdict(get_pretrained_cfg(f'{BASES[name]}.{tag}' if tag else BASES[name]))
        assert (ours.pop('architecture'), theirs.pop('architecture')) == (name, BASES[name])
        assert ours == theirs
        assert ours['tag'] in tags


@pytest.mark.parametrize('name', sorted(MICRO))
def test_small_variants_have_no_weights_of_a_base(name):
    assert not get_pretrained_cfg(name).has_weights
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('name', sorted(FAMILY))
def test_factory_dtype_and_device_reach_every_parameter(name):
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in everywhere(name).parameters())


@pytest.mark.parametrize('name', sorted(MICRO))
@pytest.mark.parametrize('kwargs,error,message', [
    (dict(cpool_positions='head'), ValueError, r"unknown position 'head' for \w+: choose from .*, or 'none'"),
    (dict(cpool_positions=['none', 'stem']), ValueError, r"unknown position 'none'"),
    (dict(cpool_stages=[4]), ValueError, r'cpool_stages must be among \(0, 1, 2, 3\), got 4'),
    (dict(cpool_init='zero'), ValueError, r"init must be one of .* got 'zero'"),
    (dict(cpool_groups=5), ValueError, r'groups must divide dim, got groups=5'),
    (dict(cpool_ratio=-1), ValueError, r'ratio must be > 0 .* got -1'),
    (dict(cpool_floor=0), ValueError, r'floor must be > 0 .* got 0'),
    (dict(cpool_position='stem'), TypeError, r"unknown keyword 'cpool_position' for \w+: choose from cpool_positions"),
])
def test_bad_keywords_are_named(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        meta_model(name, **kwargs)


def test_scripts_run_with_the_variants_registered(tmp_path, monkeypatch, capsys):
    (tmp_path / 'beside.py').write_text('NAME = "resnet18_cpool"\n')
    script = tmp_path / 'script.py'
    script.write_text('import sys, timm, beside\nif __name__ == "__main__":\n'
                      '    print(timm.is_model(beside.NAME), sys.argv[1:])\n    sys.exit(3)\n')
    done = subprocess.run(  # noqa: S603
        [sys.executable, '-m', 'cpool_vision', str(script), '--flag', 'a b'], capture_output=True, text=True)
    assert done.stdout.strip() == "True ['--flag', 'a b']" and done.returncode == 3, done.stderr
    for args, message in (['absent.py'], "error: 'absent.py' is not a file: name a Python script"), ([], ''):
        monkeypatch.setattr(sys, 'argv', ['cpool_vision', *args])
        assert run_script() == 2 and message in capsys.readouterr().err
