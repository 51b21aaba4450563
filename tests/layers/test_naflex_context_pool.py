import pytest
import torch
from torch import nn

from cpool_vision.layers import ContextPool2d, NaFlexContextPool, TokenGrids, create_mixer, find_grids


def places(height, width):
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)


def batch_of(*grids, length=None):
    """Coordinates and validity of images in order of rows, padded with coordinates that mean nothing."""
    length = length or max(len(grid) for grid in grids)
    coord = torch.full((len(grids), length, 2), 99)
    valid = torch.zeros(len(grids), length, dtype=torch.bool)
    for i, grid in enumerate(grids):
        coord[i, :len(grid)], valid[i, :len(grid)] = grid, True
    return coord, valid


def make(dim=6, **kwargs):
    torch.manual_seed(0)
    pool = NaFlexContextPool(dim, ratio=.6, **kwargs).double()
    for conv in (pool.reduce, pool.predict):
        nn.init.normal_(conv.weight, std=1 / conv.weight[0].numel() ** .5)
        nn.init.normal_(conv.bias)
    return pool


def test_full_grids_in_order_need_no_rearranging():
    grids = find_grids(*batch_of(places(3, 4), places(3, 4)), num_prefix_tokens=2)
    assert grids == TokenGrids.of_images(2, 3, 4)
    assert find_grids(places(3, 4)[None]) == TokenGrids.of_images(1, 3, 4)
    for coord, valid in (batch_of(places(3, 4), places(4, 3)), batch_of(places(3, 4), length=13),
                         batch_of(places(3, 4).flip(0)), batch_of(places(3, 4)[:-1])):
        assert find_grids(coord, valid).source is not None


def test_positions_are_told_their_tokens():
    coord, valid = batch_of(places(1, 2), places(2, 2)[torch.tensor([3, 1, 0])], places(1, 2))
    grids = find_grids(coord, valid, num_prefix_tokens=1)
    assert grids.groups == ((2, 1, 2, True), (1, 2, 2, False))
    assert grids.source.tolist() == [1, 2, 9, 10, 7, 6, 0, 5]
    assert grids.present.tolist() == [True] * 6 + [False, True] and grids.filled.tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_every_image_is_pooled_on_its_own_map():
    pool = make(groups=2, num_prefix_tokens=1, init='identity')
    nn.init.ones_(pool.gamma)
    single = ContextPool2d(6, ratio=.6, groups=2).double()
    single.load_state_dict({k: v for k, v in pool.state_dict().items() if k != 'gamma'})
    shapes = [(3, 4), (4, 3), (3, 4), (1, 1), (2, 6)]
    x = torch.randn(5, 16, 6, dtype=torch.float64)
    y = pool(x, find_grids(*batch_of(*(places(*s) for s in shapes), length=15), num_prefix_tokens=1))
    for before, after, (height, width) in zip(x, y, shapes, strict=True):
        n = 1 + height * width
        expected = single(before[1:n].T.view(1, 6, height, width)).flatten(2)[0].T
        torch.testing.assert_close(after[1:n], expected)
        assert torch.equal(after[n:], before[n:]) and torch.equal(after[0], before[0])
    same = x[:, :13]
    torch.testing.assert_close(
        pool(same, TokenGrids.of_images(5, 3, 4)),
        torch.cat([same[:, :1], single(same[:, 1:].mT.unflatten(2, (3, 4))).flatten(2).mT], 1))


@pytest.mark.parametrize('kept', [[0, 1, 2, 4, 5, 7, 11], [11]])
def test_missing_tokens_are_as_the_border(kept):
    """Convolutions see zeros there, sums leave them out; written down as sums over the tokens that are there."""
    pool = make()
    here = places(3, 4)[kept]
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    x[0, len(kept):] = float('nan')
    y = pool(x, find_grids(*batch_of(here, places(3, 3))))
    tokens, (height, width) = x[0, :len(kept)], (here.amax(0) + 1).tolist()
    hidden = pool.act(tokens @ pool.reduce.weight[:, :, 0, 0].T + pool.reduce.bias)
    maps = pool.predict.bias.repeat(len(kept), 1)
    for i, a in enumerate(here):
        for j, b in enumerate(here):
            dy, dx = (b - a + 1).tolist()
            if 0 <= dy <= 2 and 0 <= dx <= 2:
                maps[i] = maps[i] + pool.predict.weight[:, :, dy, dx] @ hidden[j]
    sigma = .1 + .6 * (height * width) ** .5 * maps[:, 1].sigmoid()
    distances = torch.cdist(here.double(), here.double()).square()
    logits = 8 * (maps[:, 0] / 8).tanh()
    expected = (logits - distances / (2 * sigma[:, None].square())).softmax(1) @ tokens
    torch.testing.assert_close(y[0, :len(kept)], expected)
    assert y[0, len(kept):].isnan().all() and y[1].isfinite().all()


def test_gradients_of_groups_and_missing_tokens():
    pool = make(4, hidden_dim=3, init='identity')
    nn.init.uniform_(pool.gamma)
    grids = find_grids(*batch_of(places(2, 3)[:5], places(2, 2), places(2, 2), length=6))
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*pool.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(pool, dict(zip(names, values, strict=True)), (x, grids))
    assert torch.autograd.gradcheck(call, (x, *values))


def test_a_mean_of_neighbors_counts_only_those_present():
    pool = create_mixer(1, mixer='average', layout='naflex').double()
    x = torch.tensor([[[1.], [2.], [6.]]], dtype=torch.float64)
    y = pool(x, find_grids(torch.tensor([[[0, 0], [0, 1], [1, 1]]])))
    assert y.flatten().tolist() == [3., 3., 3.]


@pytest.mark.parametrize('call, message', [
    (lambda: find_grids(torch.tensor([[[0, 0], [0, 1], [0, 1]]])), '1 valid patches of the batch lie at the place'),
    (lambda: find_grids(torch.tensor([[[0, 0], [0, -1]]])), 'image 0 of the batch has a patch at coordinate -1'),
    (lambda: find_grids(torch.zeros(2, 1, 2), torch.tensor([[True], [False]])), 'image 1 of the batch has no valid'),
    (lambda: NaFlexContextPool(4)(torch.randn(1, 4, 4)), 'no grids are given'),
    (lambda: NaFlexContextPool(4)(torch.randn(1, 5, 4), TokenGrids.of_images(1, 2, 2)), '2 x 2 grid, got 5 tokens'),
    (lambda: NaFlexContextPool(4).maps(
        torch.randn(1, 5, 4), find_grids(*batch_of(places(2, 2), length=5))), 'no common map'),
    (lambda: NaFlexContextPool(4, stride=2), 'pooled at stride 1, got stride=2'),
    (lambda: NaFlexContextPool(4, num_prefix_tokens=-1), 'num_prefix_tokens must be at least 0, got -1'),
    (lambda: create_mixer(4, layout='NLC'), "layout must be one of .*'naflex'.*, got 'NLC'"),
])
def test_what_cannot_be_pooled_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
