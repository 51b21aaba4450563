import pytest
import torch
from torch import nn

from cpool_vision.layers import ContextPool2d, TokenContextPool


def make(dim=16, prefix=1, **kwargs):
    torch.manual_seed(0)
    pool = TokenContextPool(dim, num_prefix_tokens=prefix, ratio=0.5, **kwargs)
    for conv in (pool.reduce, pool.predict):
        nn.init.normal_(conv.weight, std=.3)
    return pool


@pytest.mark.parametrize('prefix', [0, 1, 5])
@pytest.mark.parametrize('grid', [(4, 4), (3, 7), (1, 2)])
def test_tokens_are_pooled_as_a_map_and_prefix_tokens_pass(grid, prefix):
    pool = make(prefix=prefix, grid_size=grid)
    flat = ContextPool2d(16, ratio=0.5)
    flat.load_state_dict(pool.state_dict())
    x = torch.randn(2, prefix + grid[0] * grid[1], 16)
    y = pool(x)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    expected = flat(x[:, prefix:].transpose(1, 2).reshape(2, 16, *grid)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y[:, prefix:], expected, rtol=1e-4, atol=1e-5)
    assert y.shape == x.shape


def test_the_map_is_a_view_in_channels_last_order():
    pool = make(grid_size=(3, 4))
    x = torch.randn(2, 13, 16)
    view = pool.to_map(x, None, None)
    assert view.shape == (2, 16, 3, 4)
    assert view.stride(1) == 1 and view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_named_grid_goes_before_the_set_one():
    pool = make(grid_size=(2, 6))
    x = torch.randn(1, 13, 16)
    first = pool(x)
    assert not torch.allclose(pool(x, 6, 2), first)
    weight_logits, sigma = pool.maps(x, 6, 2)
    assert weight_logits.shape == sigma.shape == (1, 1, 6, 2)
    pool.grid_size = (6, 2)
    assert torch.equal(pool(x), make(grid_size=(6, 2))(x))
    assert pool.grid_size == (6, 2)


def test_identity_returns_its_input():
    x = torch.randn(2, 10, 16)
    assert torch.equal(make(init='identity', grid_size=(3, 3))(x), x)


@pytest.mark.parametrize('args', [(), (3, 4)])
@pytest.mark.filterwarnings('ignore')
def test_torchscript_and_fx_equal_eager(args):
    pool = make(grid_size=(4, 3))
    x = torch.randn(2, 13, 16)
    y = pool(x, *args)
    scripted = torch.jit.script(pool)
    for _ in range(3):
        assert torch.equal(scripted(x, *args), y)

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = pool

        def forward(self, x):
            return self.pool(x, *args)

    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = pool

        def forward(self, images):
            return self.pool(images.flatten(1, 2), images.shape[1], images.shape[2])

    traced = torch.fx.symbolic_trace(Caller())
    assert torch.equal(traced(x), y)
    assert torch.equal(torch.jit.script(traced)(x), y)
    pool.num_prefix_tokens = 0
    dynamic = torch.fx.symbolic_trace(Dynamic())
    for shape in ((2, 3, 4, 16), (1, 5, 2, 16)):
        images = torch.randn(shape)
        assert torch.equal(dynamic(images), Dynamic()(images))


@pytest.mark.parametrize('call', [(), (4, 4), (3, 5)])
def test_tokens_that_do_not_fit_the_grid_are_refused(call):
    pool = make(grid_size=(2, 3))
    with pytest.raises(ValueError, match=r'1 prefix tokens and a \d x \d grid, got 14 tokens: pass the height'):
        pool(torch.randn(1, 14, 16), *call)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match='0 x 0 grid, got 14 tokens.*set grid_size'):
        make()(torch.randn(1, 14, 16))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='pooled at stride 1, got stride=2'):
        TokenContextPool(16, stride=2)
    with pytest.raises(ValueError, match='num_prefix_tokens must be at least 0, got -1'):
        TokenContextPool(16, num_prefix_tokens=-1)


def test_costs_at_most_three_percent_of_a_vit_s_block():
    from timm.models.vision_transformer import Block
    block = Block(384, 6, qkv_bias=True, device='meta')
    pool = TokenContextPool(384, init='identity', device='meta')
    share = sum(p.numel() for p in pool.parameters()) / sum(p.numel() for p in block.parameters())
    assert share <= .03
