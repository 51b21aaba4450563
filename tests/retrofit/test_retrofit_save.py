import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import cpool_vision
from cpool_vision.cli import retrofit, validate
from cpool_vision.retrofit import NoPlaceError, add_context_pool, context_pools, save_model


def trained(name='test_vit', **kwargs):
    torch.manual_seed(0)
    size = 64
    if name == 'test_vit':
        size = kwargs.setdefault('img_size', 64)
    model = add_context_pool(
        timm.create_model(name, num_classes=7, **kwargs).eval(), ratio=.2, support_init=.3, img_size=size)
    for pool in context_pools(model).values():
        nn.init.uniform_(pool.gamma, .3, 1)
    return model


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet'])
def test_a_folder_rebuilds_the_model(tmp_path, name):
    model, x = trained(name), torch.randn(2, 3, 64, 64)
    save_model(model, str(tmp_path / 'new' / 'model'))
    folder = tmp_path / 'new' / 'model'
    assert files(folder) == ['config.json', 'model.safetensors'] and files(tmp_path / 'new') == ['model']
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'contextpool_retrofit' and config['num_classes'] == 7
    assert config['model_args']['base'] == name and 'num_classes' not in config['model_args']

    source = f'local-dir:{folder}'
    again = timm.create_model(source, pretrained=True).eval()
    assert torch.equal(again(x), model(x)) and again.num_classes == 7
    assert {(pool.ratio, pool.support_init) for pool in context_pools(again).values()} == {(.2, .3)}
    fresh = timm.create_model(source).eval()
    assert not torch.equal(fresh(x), model(x)) and list(context_pools(fresh)) == list(context_pools(model))
    for pool in context_pools(fresh).values():
        assert pool.predict.bias[pool.groups:].sigmoid().tolist() == pytest.approx([.3] * pool.groups)
    fewer = timm.create_model(source, pretrained=True, num_classes=3, in_chans=1).eval()
    assert fewer(x[:, :1]).shape == (2, 3)
    assert torch.equal(next(iter(context_pools(fewer).values())).gamma, next(iter(context_pools(model).values())).gamma)
    headless = timm.create_model(source, pretrained=True, num_classes=0).eval()
    assert torch.equal(headless(x), model.forward_head(model.forward_features(x), pre_logits=True))
    features = timm.create_model(source, pretrained=True, features_only=True).eval()
    maps = features(x)
    assert [y.shape[1] for y in maps] == features.feature_info.channels()
    assert torch.equal(maps[-2], model.forward_intermediates(x, intermediates_only=True)[-2])

    # saved once more, by timm's own function
    save_for_hf(again, str(tmp_path / 'second'), safe_serialization=True)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path / "second"}', pretrained=True).eval()(x), model(x))


def test_a_model_at_another_size(tmp_path):
    model = trained('test_vit', img_size=96)
    save_model(model, str(tmp_path / 'model'))
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(again(x), model(x))
    assert context_pools(again)['blocks.0.attn.cpool'].grid_size == (6, 6)


def test_a_model_in_channels_last_memory_is_saved(tmp_path):
    model = trained('test_resnet').to(memory_format=torch.channels_last)
    save_model(model, str(tmp_path / 'model'))
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert any(not value.is_contiguous() for value in model.state_dict().values())  # the model itself keeps its format


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    folder = tmp_path / 'model'
    save_model(trained(), str(folder))
    (folder / 'notes.txt').write_text('mine')
    before = (folder / 'model.safetensors').read_bytes()
    with pytest.raises(FileExistsError, match='already has a model .config.json.: choose another folder or pass force'):
        save_model(trained('test_resnet'), str(folder))
    assert (folder / 'model.safetensors').read_bytes() == before

    def broken(model, folder, **kwargs):
        (tmp_path / os.path.basename(folder) / 'model.safetensors').write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('cpool_vision.hub.save_for_hf', broken)
        with pytest.raises(OSError, match='No space'):
            save_model(trained('test_resnet'), str(folder), force=True)
    assert (folder / 'model.safetensors').read_bytes() == before and files(tmp_path) == ['model']
    save_model(trained('test_resnet'), str(folder), force=True)
    assert (folder / 'model.safetensors').read_bytes() != before and (folder / 'notes.txt').read_text() == 'mine'
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(FileExistsError, match='is a file: name a folder'):
        save_model(trained(), str(tmp_path / 'file'))


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match='is not a timm model with pools from add_context_pool'):
        save_model(timm.create_model('test_resnet'), str(tmp_path / 'model'))
    assert files(tmp_path) == []


def test_the_architecture_by_its_name():
    model = timm.create_model('contextpool_retrofit', base='test_resnet', num_classes=4, cpool_positions='post_block',
                              cpool_stages=[2, 3, 4], cpool_init='paper', cpool_support_init=.2)
    assert model.num_classes == 4 and model.pretrained_cfg['architecture'] == 'contextpool_retrofit'
    assert all(pool.gamma is None and pool.support_init == .2 for pool in context_pools(model).values())
    assert not [name for name in cpool_vision.list_models() if 'retrofit' in name]
    for wrong in (None, 'local-dir:folder', 'hf-hub:owner/name', 'contextpool_retrofit', 3):
        with pytest.raises(ValueError, match=f'needs the registered name of a base model, got base={wrong!r}: pass'):
            timm.create_model('contextpool_retrofit', base=wrong)
    with pytest.raises(ValueError, match="unknown base model 'resnet99'"):
        timm.create_model('contextpool_retrofit', base='resnet99')
    with pytest.raises(TypeError, match="unknown keyword 'cpool_size' .*cpool_ratio"):
        timm.create_model('contextpool_retrofit', base='test_resnet', cpool_size=3)
    with pytest.raises(NoPlaceError, match="no place 'pre_attn'"):
        timm.create_model('contextpool_retrofit', base='test_resnet', cpool_positions='pre_attn')


def test_weights_of_the_base_by_the_name_of_the_architecture(tmp_path):
    base = timm.create_model('test_resnet').eval()
    save_file(base.state_dict(), tmp_path / 'base.safetensors')
    model = timm.create_model('contextpool_retrofit', pretrained=True, base='test_resnet',
                              pretrained_cfg_overlay={'file': str(tmp_path / 'base.safetensors')}).eval()
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(model(x), base(x)) and context_pools(model)


def test_the_command(tmp_path, capsys):
    base = timm.create_model('test_vit', num_classes=10).eval()
    save_file(base.state_dict(), tmp_path / 'base.safetensors')
    folder = tmp_path / 'model'
    command = ['test_vit', '-o', str(folder), '--checkpoint', str(tmp_path / 'base.safetensors'),
               '--num-classes', '10', '--positions', 'pre_attn', '--stages', '0', '2', '--ratio', '0.3',
               '--support-init', '0.1']
    assert retrofit.main(command) == 0
    out = capsys.readouterr().out
    assert 'blocks.2.attn.cpool' in out and '2 context pools' in out and f'local-dir:{folder}' in out
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(model(x), base(x))
    weights = load_file(folder / 'model.safetensors')
    assert set(base.state_dict()) < set(weights)
    assert {(pool.ratio, pool.support_init) for pool in context_pools(model).values()} == {(.3, .1)}
    assert weights['blocks.2.attn.cpool.predict.bias'].sigmoid()[-1].item() == pytest.approx(.1)

    assert retrofit.main(command) == 2
    assert 'already contains a model, or is a file: pass --force to overwrite it' in capsys.readouterr().err
    assert retrofit.main([*command, '--force']) == 0
    again = load_file(folder / 'model.safetensors')  # fresh pools are drawn alike
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert retrofit.main([*command, '--force', '--seed', '1']) == 0
    other = load_file(folder / 'model.safetensors')['blocks.2.attn.cpool.predict.weight']
    assert not torch.equal(other, again['blocks.2.attn.cpool.predict.weight'])

    # the folder is a model like any other
    assert validate.main(['--model', f'local-dir:{folder}', '--pretrained', '--dataset', 'cpool/shapes', '--workers',
                          '0', '--num-samples', '8', '-b', '4', '--device', 'cpu']) == 0


@pytest.mark.parametrize('arguments, message', [
    (['resnet99'], "unknown model 'resnet99': close matches"),
    (['test_resnet', '--positions', 'pre_attn'], "test_resnet: ResNet has no place 'pre_attn': choose from post_stage"),
    (['test_resnet', '--checkpoint', 'absent.pth'], "--checkpoint 'absent.pth' does not exist"),
    (['test_resnet', '--ratio', '-1'], 'ratio must be > 0'),
    (['test_resnet', '--support-init', '1.5'], 'test_resnet: support_init must lie between 0 and 1'),
    (['vit_tiny_cpool_patch16_224'], 'already has context pools'),
])
def test_errors_of_the_command(tmp_path, capsys, arguments, message):
    assert retrofit.main([*arguments, '-o', str(tmp_path / 'model')]) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path) == []
