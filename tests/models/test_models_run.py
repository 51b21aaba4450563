import pytest
import timm
import torch
from torch import nn

from cpool_vision.layers import mixers

CONV = ['convnext_micro_cpool_32', 'resnet_micro_cpool_32', 'poolformer_micro_cpool_32']
VIT = 'vit_micro_cpool_patch4_32'
MICRO = [*CONV, 'naflexvit_micro_cpool_patch4_gap', 'swin_micro_cpool_patch2_window4_32', VIT]


def make(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for _, pool in mixers(model):
        for conv in (pool.reduce, pool.predict):
            nn.init.normal_(conv.weight, std=1 / conv.weight[0].numel() ** .5)
        if pool.gamma is not None:
            nn.init.uniform_(pool.gamma)
    return model


@pytest.mark.parametrize('name', MICRO)
def test_the_classifier_can_be_read_and_replaced(name):
    model = make(name)
    head = model.get_classifier()
    assert isinstance(head, nn.Linear) and head.out_features == 10
    assert any(head is m for m in model.modules())
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model.num_classes == 3
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize('name', CONV)
@pytest.mark.parametrize('size', [(32, 48), (40, 24), (33, 31), (8, 8)])
def test_conv_variants_take_any_size(name, size):
    model = make(name)
    assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize('prefix', [dict(), dict(class_token=True, global_pool='token', reg_tokens=2)])
@pytest.mark.parametrize('no_embed_class', [False, True])
def test_vit_takes_other_sizes(prefix, no_embed_class):
    x = torch.randn(2, 3, 24, 40)
    fixed = make(VIT, no_embed_class=no_embed_class, **prefix)
    with pytest.raises(AssertionError, match='Input height'):
        fixed(x)
    native = fixed(torch.ones(1, 3, 32, 32))
    dynamic = make(VIT, dynamic_img_size=True, no_embed_class=no_embed_class, **prefix)
    dynamic.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(dynamic(torch.ones(1, 3, 32, 32)), native)

    fixed.set_input_size(img_size=(24, 40))
    assert {pool.grid_size for _, pool in mixers(fixed)} == {(6, 10)}
    torch.testing.assert_close(dynamic(x), fixed(x), rtol=1e-4, atol=1e-4)
    assert dynamic(torch.randn(1, 3, 16, 60)).isfinite().all()

    built = make(VIT, img_size=(24, 40), no_embed_class=no_embed_class, **prefix)
    built.load_state_dict(fixed.state_dict())
    assert torch.equal(built(x), fixed(x))


def test_vit_takes_another_patch_size_and_padding():
    model = make(VIT)
    model.set_input_size(img_size=(32, 64), patch_size=(8, 4))
    assert {pool.grid_size for _, pool in mixers(model)} == {(4, 16)}
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 10)
    padded = make(VIT, dynamic_img_size=True, dynamic_img_pad=True)
    assert padded(torch.randn(1, 3, 30, 45)).shape == (1, 10)
    _, features = padded.forward_intermediates(torch.randn(1, 3, 30, 45))
    assert features[0].shape == (1, 128, 8, 12)


def test_a_block_alone_uses_the_set_grid_and_refuses_other_tokens():
    block = make(VIT).blocks[0]
    x = torch.randn(1, 64, 128)
    assert torch.equal(block(x), block(x, None, False, 8, 8))
    assert not torch.allclose(block(x, None, False, 4, 16), block(x))
    with pytest.raises(ValueError, match='8 x 8 grid, got 60 tokens'):
        block(x[:, :60])


@pytest.mark.parametrize('name', MICRO)
def test_other_channel_counts(name):
    for in_chans in (1, 5):
        assert make(name, in_chans=in_chans)(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('name', MICRO)
def test_channels_last_equals_contiguous(name):
    model = make(name)
    x = torch.randn(2, 3, 32, 32)
    y = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', MICRO)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_near_fp32(name, dtype):
    model = make(name)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        with torch.autocast('cpu', dtype):
            low = model(x)
    # every block of a PoolFormer mixes by differences to its input
    assert (low.float() - y).norm() < (.1 if name.startswith('poolformer') else .05) * y.norm()
    if dtype == torch.float16:  # no fast fp16 convolution backward on CPU
        return
    with torch.autocast('cpu', dtype):
        model.train()(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', MICRO)
def test_images_of_a_batch_do_not_meet(name):
    model = make(name)
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', CONV)
def test_features_only(name):
    backbone = timm.create_model(name, features_only=True).eval()
    features = backbone(torch.randn(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == backbone.feature_info.channels()
    assert [32 // f.shape[-1] for f in features] == backbone.feature_info.reduction()


def test_intermediates_of_vit_match_the_plain_forward():
    model = make(VIT, class_token=True, reg_tokens=1, global_pool='token', dynamic_img_size=True)
    x = torch.randn(2, 3, 24, 40)
    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: tokens.append(y))
    final = model.forward_features(x)
    expected = list(tokens)

    out, features = model.forward_intermediates(x, output_fmt='NLC')
    assert torch.equal(out, final) and len(features) == 6
    assert all(torch.equal(f, t[:, 2:]) for f, t in zip(features, expected, strict=True))
    maps = model.forward_intermediates(x, indices=[1, 4], intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 128, 6, 10)] * 2
    assert torch.equal(maps[1], expected[4][:, 2:].transpose(1, 2).reshape(2, 128, 6, 10))
    (grid, prefix), = model.forward_intermediates(
        x, indices=1, return_prefix_tokens=True, norm=True, intermediates_only=True)
    assert torch.equal(prefix, final[:, :2])
    tokens.clear()
    named = model.forward_intermediates(x, indices=[0, 2], stop_early=True, output_dict=True, return_prefix_tokens=True)
    assert len(tokens) == 3
    assert sorted(named) == ['image_features', 'image_intermediates', 'image_intermediates_prefix']
    assert torch.equal(named['image_intermediates_prefix'][1], expected[2][:, :2])
    assert torch.equal(named['image_features'], model.norm(expected[2]))
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(x, output_fmt='NHWC')


def test_intermediates_of_vit_match_timms_own():
    plain = make(VIT, cpool_positions='none', class_token=True, global_pool='token')
    timms = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=10).eval()
    timms.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for kwargs in (
            dict(), dict(indices=2, norm=True), dict(indices=[0, 5], output_fmt='NLC', intermediates_only=True),
            dict(return_prefix_tokens=True, stop_early=True, indices=[1]), dict(is_causal=True),
            dict(output_dict=True, return_prefix_tokens=True)):
        ours, theirs = plain.forward_intermediates(x, **kwargs), timms.forward_intermediates(x, **kwargs)
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(plain(x), timms(x))
    mask = torch.zeros(65, 65).masked_fill(torch.ones(65, 65).triu(1).bool(), float('-inf'))
    torch.testing.assert_close(plain(x, attn_mask=mask), timms(x, attn_mask=mask))
    assert not torch.allclose(plain(x, attn_mask=mask), plain(x))


@pytest.mark.parametrize('name', MICRO)
def test_pruning_keeps_pools_of_kept_layers(name):
    model = make(name)
    model.prune_intermediate_layers([3], prune_head=True)
    assert list(mixers(model))
    assert model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[3], intermediates_only=True)[0].shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', MICRO)
def test_compiles_in_one_graph_forward_and_backward(name):
    compile_and_compare(make(name, cpool_init='identity'), torch.randn(2, 3, 32, 32))


def test_pooled_vit_block_compiles_in_one_graph():
    model = make(VIT, depth=2, embed_dim=32, num_heads=2, class_token=True, global_pool='token')
    compile_and_compare(model, torch.randn(2, 3, 32, 32), backend='aot_eager')


def compile_and_compare(model, x, **kwargs):
    compiled = torch.compile(model, fullgraph=True, **kwargs)
    expected = model(x)
    expected.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    y.square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], rtol=1e-2, atol=1e-4 + 1e-3 * float(grads[n].abs().max()))
