"""NaFlexViT: one grid per image, padding that weighs nothing, and results that do not depend on the batch."""
import importlib.util

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.models import NaFlexVit
from timm.models.naflexvit import batch_patchify
from torch import nn

from cpool_vision.inspect import context_maps
from cpool_vision.layers import MIXERS, TokenGrids
from cpool_vision.models import naflexvit
from cpool_vision.ops import maps

NAME = 'naflexvit_micro_cpool_patch4_gap'
EVERYWHERE = ['post_block', 'pre_attn']
# in pixels: two images share a grid, one is a row, one fills the sequence
SIZES = [(12, 24), (24, 12), (12, 24), (4, 32), (20, 20)]
GRIDS = [(3, 6), (6, 3), (3, 6), (1, 8), (5, 5)]


def make(**kwargs):
    torch.manual_seed(0)
    kwargs = dict(depth=2, embed_dim=32, num_heads=2, reg_tokens=2, num_classes=5, cpool_ratio=.6,
                  cpool_positions=EVERYWHERE) | kwargs
    model = timm.create_model(NAME, **kwargs).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, 1. if p.ndim == 1 else 0., .3 if p.ndim == 1 else 1.5 / p[0].numel() ** .5)
    return model


def images():
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, *size, generator=gen, dtype=torch.float64) for size in SIZES]


def as_patches(image):
    patches, (height, width) = batch_patchify(image, (4, 4))
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return dict(
        patches=patches, patch_coord=torch.stack([rows, cols], -1).view(1, -1, 2),
        patch_valid=torch.ones(1, height * width, dtype=torch.bool))


def batch_of(single, length=27, garbage=0.):
    """One batch of patch dictionaries, padded to `length` tokens that hold `garbage`."""
    def pad(key, fill):
        return torch.cat([
            torch.cat([one[key], one[key].new_full((1, length - one[key].shape[1], *one[key].shape[2:]), fill)], 1)
            for one in single])
    return dict(
        patches=pad('patches', garbage), patch_coord=pad('patch_coord', 0), patch_valid=pad('patch_valid', False))


@pytest.mark.parametrize('kwargs', [
    dict(), dict(cpool_groups=4, cpool_init='identity', cpool_positions='post_block'), dict(cpool_positions='pre_attn'),
    dict(cpool_backend='reference'), dict(cpool_backend='tiled'), dict(pos_embed='factorized', reg_tokens=0),
    dict(class_token=True, global_pool='token', use_key_only_attn_mask=True),
    # one of the images has a single row of patches, which `blur` refuses
    *(dict(cpool_mixer=mixer) for mixer in MIXERS[1:]
      if mixer != 'blur' and (mixer != 'dcls' or importlib.util.find_spec('DCLS')))], ids=str)
def test_a_batch_of_patches_equals_every_image_alone(kwargs):
    model = make(**kwargs)
    with torch.no_grad():
        alone = torch.cat([model(image) for image in images()])
        single = [as_patches(image) for image in images()]
        torch.testing.assert_close(torch.cat([model(one) for one in single]), alone, rtol=1e-11, atol=1e-11)
        for batch in (batch_of(single), batch_of(single, garbage=1e4)):
            torch.testing.assert_close(model(batch), alone, rtol=1e-9, atol=1e-9)
        # 18 tokens of 3 x 6 and of 6 x 3 without padding; and one kind of grid, with and without
        for part in ([0, 1], [0, 2]):
            batch = batch_of([single[i] for i in part], 18)
            torch.testing.assert_close(model(batch), alone[part], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            model(batch_of([single[0], single[2]])), alone[[0, 2]], rtol=1e-9, atol=1e-9)


def test_without_grids_of_their_own_padding_would_be_pooled(monkeypatch):
    """What the test above would see if the pools took a padded sequence for a grid."""
    model = make()
    batches = [batch_of([as_patches(image) for image in images()], garbage=garbage) for garbage in (0., 1e4)]
    with torch.no_grad():
        expected, same = (model(batch) for batch in batches)
        torch.testing.assert_close(same, expected)
        monkeypatch.setattr(naflexvit, 'grids_of_input', lambda *_: TokenGrids.of_images(len(SIZES), 3, 9))
        pooled, garbage = (model(batch) for batch in batches)
    assert (pooled - expected).abs().amin(1).min() > 1e-6 and (pooled - expected).abs().amax(1).min() > 1e-2
    assert (garbage - pooled).abs().amax(1).min() > 1e-2


def test_supports_follow_the_grid_of_their_image(monkeypatch):
    model = make(cpool_positions='post_block', pos_embed='none')
    single = [as_patches(image) for image in images()]
    turned = dict(single[0], patch_coord=single[1]['patch_coord'])
    with torch.no_grad():
        assert (model(turned) - model(single[0])).abs().max() > 1e-3
        expected = model(batch_of(single))
        original = maps.largest_support
        monkeypatch.setattr(maps, 'largest_support', lambda raw, ratio: original(raw.new_empty(8, 8), ratio))
        assert ((model(batch_of(single)) - expected).abs().amax(1) > 1e-4).all()


def test_gradients_of_a_batch_are_the_sums_of_those_alone_and_none_reaches_padding():
    model = make()
    single = [as_patches(image) for image in images()]
    target = torch.randn(len(single), 5, dtype=torch.float64)
    for one, goal in zip(single, target, strict=True):
        (model(one)[0] * goal).sum().backward()
    alone = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    batch = batch_of(single, garbage=3.)
    batch['patches'].requires_grad_()
    (model(batch) * target).sum().backward()
    for n, p in model.named_parameters():
        if n == 'embeds.pos_embed':  # interpolated in fp32
            torch.testing.assert_close(p.grad, alone[n], rtol=1e-4, atol=1e-5)
            continue
        torch.testing.assert_close(p.grad, alone[n], rtol=1e-9, atol=1e-9 * float(1 + alone[n].abs().max()))
    assert not batch['patches'].grad[~batch['patch_valid']].any()
    assert batch['patches'].grad[batch['patch_valid']].any(1).all()


def test_grids_with_missing_patches():
    """A loader cuts what is too long: patches in order, the last row not full."""
    model = make()
    single = [as_patches(image) for image in images()]
    cut = {key: value[:, :22] for key, value in single[4].items()}
    with torch.no_grad():
        alone = torch.cat([model(one) for one in [*single[:4], cut]])
        torch.testing.assert_close(model(batch_of([*single[:4], cut])), alone, rtol=1e-9, atol=1e-9)
        kept = {key: value[:, :20] for key, value in single[4].items()}
        assert (model(cut) - model(kept)).abs().max() > 1e-3


def test_padding_may_stand_anywhere_and_patches_in_any_order():
    # position embeddings of timm's count on the order, unless they are sampled
    model = make(pos_embed_use_grid_sample=True)
    batch = batch_of([as_patches(image) for image in images()], garbage=7.)
    order = torch.stack([torch.randperm(27) for _ in SIZES])
    mixed = {key: torch.stack([v[o] for v, o in zip(value, order, strict=True)]) for key, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(mixed), model(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('size', [(32, 32), (4, 40), (20, 36), (4, 4)])
@pytest.mark.parametrize('prefix', [dict(reg_tokens=0), dict(class_token=True, global_pool='token')])
def test_images_of_any_size(size, prefix):
    model = make(**prefix)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    grid = size[0] // 4, size[1] // 4
    final, features = model.forward_intermediates(x)
    assert [f.shape for f in features] == [(2, 32, *grid)] * 2
    assert torch.equal(final, model.forward_features(x))
    assert {maps.grid for maps in context_maps(model, x).values()} == {grid}
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


def test_padded_images_and_convolutional_embeddings():
    x = torch.randn(2, 3, 30, 17, dtype=torch.float64)
    for kwargs in (dict(), dict(embed_proj_type='conv')):
        padded = make(dynamic_img_pad=True, **kwargs)
        assert {maps.grid for maps in context_maps(padded, x).values()} == {(8, 5)}
    model = make(embed_proj_type='conv')
    assert {maps.grid for maps in context_maps(model, x).values()} == {(7, 4)}


def test_without_pools_it_is_timms_own():
    plain = make(cpool_positions='none')
    timms = NaFlexVit(
        patch_size=4, embed_dim=32, depth=2, num_heads=2, pos_embed_grid_size=(8, 8), global_pool='avg', fc_norm=True,
        reg_tokens=2, num_classes=5).double().eval()
    timms.load_state_dict(plain.state_dict())
    timm.create_model(NAME, cpool_positions='none', rope_type='axial', patch_drop_rate=.5, device='meta')
    batch = batch_of([as_patches(image) for image in images()])
    assert torch.equal(plain(batch), timms(batch))
    kwargs = dict(output_fmt='NLC', output_dict=True, return_prefix_tokens=True, indices=[0])
    torch.testing.assert_close(
        plain.forward_intermediates(batch, **kwargs), timms.forward_intermediates(batch, **kwargs), rtol=0, atol=0)


def test_intermediates_of_patches():
    model = make()
    batch = batch_of([as_patches(image) for image in images()])
    named = model.forward_intermediates(batch, output_fmt='NLC', output_dict=True)
    assert torch.equal(named['patch_valid'], batch['patch_valid'])
    assert [f.shape for f in named['image_intermediates']] == [(5, 27, 32)] * 2
    assert torch.equal(named['image_features'], model.forward_features(**batch)['patches'])
    with pytest.raises(ValueError, match='NCHW'):
        model.forward_intermediates(batch)


def test_checkpointing_changes_no_gradient_of_patches():
    model = make().train()
    batch = batch_of([as_patches(image) for image in images()])
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(batch).square().sum().backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(*results)


def test_autocast_of_patches_stays_near_fp32():
    model = make().float()
    batch = batch_of([as_patches(image) for image in images()])
    batch['patches'] = batch['patches'].float()
    y = model(batch)
    with torch.autocast('cpu', torch.bfloat16):
        low = model(batch)
        low.float().sum().backward()
    assert (low.float() - y).norm() < .05 * y.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiled_patches_equal_eager_without_a_graph_per_batch():
    model = make().float()
    single = [as_patches(image) for image in images()]
    batches = [batch_of([single[i] for i in part]) for part in ([0, 1, 2], [1, 3, 4], [2, 0, 0], [4, 4, 3], [3, 1, 0])]
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    frames = []
    for batch in batches:
        batch['patches'] = batch['patches'].float()
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch), model(batch))
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames[1:] == frames[1:2] * 4, frames


def test_what_leaves_no_grid_is_refused():
    with pytest.raises(ValueError, match='patch_drop_rate must be 0 with context pooling, got 0.5'):
        timm.create_model(NAME, patch_drop_rate=.5, device='meta')
    with pytest.raises(ValueError, match='block_fn must be left out'):
        timm.create_model(NAME, block_fn=nn.Identity, device='meta')
    with pytest.raises(ValueError, match='ask for EvaBlock.*leave out rope_type'):
        timm.create_model(NAME, rope_type='axial', device='meta')
    with pytest.raises(TypeError, match='embed_dims'):
        timm.create_model(NAME, embed_dims=3, device='meta')
    with pytest.raises(ValueError, match='no grids are given'):
        make().blocks[0](torch.randn(1, 6, 32, dtype=torch.float64))
    batch = batch_of([as_patches(image) for image in images()])
    batch['patch_valid'][3] = False
    with pytest.raises(ValueError, match='image 3 of the batch has no valid patch'):
        make()(batch)
