"""Supports that groups share, and cells that look round another place than their own."""
import pytest
import torch
from ops_testing import FAST_BACKENDS, HOST_BACKENDS, assert_close_to_definition, make_case, run

from cpool_vision.ops import available_backends, context_pool2d, context_pool2d_reference


def _shared_case(b, c, h, w, groups, shared, stride=1, sigma=(0.3, 2.0), **kwargs):
    x, logits, supports, grad = make_case(b, c, h, w, groups, stride, sigma, **kwargs)
    return x, logits, supports[:, :shared].clone(), grad


@pytest.mark.parametrize('shape', [(2, 24, 9, 11, 6, 2, 1), (1, 12, 30, 23, 6, 3, 2), (2, 32, 14, 14, 4, 1, 1),
                                   (1, 48, 21, 17, 16, 1, 1)],
                         ids=lambda s: '-'.join(map(str, s)))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize('backend', HOST_BACKENDS)
def test_shared_supports_are_those_of_every_group_repeated(shape, dtype, backend, poisoned_memory):
    *size, groups, shared, stride = shape
    case = _shared_case(*size, groups, shared, stride, dtype=dtype)

    def repeated(x, logits, sigma):
        each = sigma.repeat_interleave(groups // shared, 1)
        return context_pool2d_reference(x, logits, each, stride)

    def pooled(x, logits, sigma):
        return context_pool2d(x, logits, sigma, stride=stride, backend=backend)

    assert run(pooled, case)['dsigma'].shape == case[2].shape
    assert_close_to_definition(pooled, repeated, case, stride)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_shared_supports_with_logits_far_apart_in_one_group(backend):
    case = _shared_case(1, 12, 20, 17, 3, 1)
    case[1][:, 1] *= 40
    assert_close_to_definition(
        lambda *args: context_pool2d(*args, backend=backend), context_pool2d_reference, case)


OFFSETS = [(2, 6, 2, 9, 11), (1, 6, 2, 1, 1), (2, 6, 2, 1, 11), (1, 6, 2, 9, 1)]


@pytest.mark.parametrize('shape', OFFSETS, ids=lambda s: '-'.join(map(str, s)))
@pytest.mark.parametrize('backend', ['tiled', 'reference'])
def test_offset_moves_the_place_that_cells_look_round(shape, backend):
    case = _shared_case(2, 24, 9, 11, 6, 3)
    offset = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2
    at = torch.stack(torch.meshgrid(torch.arange(9.), torch.arange(11.), indexing='ij')).double()

    def definition(x, logits, sigma):
        """All distances at once, as the formula says."""
        center = at[None, None] + moved
        distance = (center.flatten(3)[..., None] - at.flatten(1)[:, None]).square().sum(2)
        scale = 2 * sigma.repeat_interleave(2, 1).flatten(2)[..., None].square()
        attn = (logits.flatten(2)[:, :, None] - distance / scale).softmax(-1)
        return torch.einsum('bgij,bgcj->bgci', attn, x.unflatten(1, (6, -1)).flatten(3)).reshape(x.shape)

    moved = offset.double().requires_grad_()
    exact = run(definition, case, dtype=torch.float64)
    leaf = offset.clone().requires_grad_()
    got = run(lambda *args: context_pool2d(*args, offset=leaf, backend=backend), case)
    for name, value in exact.items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(leaf.grad.double(), moved.grad, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize('backend', ['tiled', 'reference'])
def test_gradients_with_offset(backend):
    x, logits, sigma, _ = _shared_case(1, 4, 6, 5, 2, 1, dtype=torch.float64)
    offset = torch.tensor([[[0.3, -0.7], [4.2, 0.1]]], dtype=torch.float64)[..., None, None]
    inputs = tuple(t.requires_grad_() for t in (x, logits, sigma, offset))
    assert torch.autograd.gradcheck(
        lambda x, logits, sigma, offset: context_pool2d(x, logits, sigma, offset=offset, backend=backend), inputs)


@pytest.mark.parametrize('backend', ['tiled', 'reference'])
def test_zero_offset_changes_nothing_and_whole_pixels_shift(backend):
    x, logits, sigma, _ = make_case(1, 4, 30, 33, groups=2, sigma=(0.4, 1.0))
    plain = context_pool2d(x, logits, sigma, backend=backend)
    still = context_pool2d(x, logits, sigma, offset=torch.zeros(1, 2, 2, 1, 1), backend=backend)
    torch.testing.assert_close(still, plain, rtol=1e-5, atol=1e-6)
    offset = torch.tensor([3., -2.]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 1, 1)
    same = torch.full_like(sigma, 0.7)
    moved = context_pool2d(x, logits, same, offset=offset, backend=backend)
    expected = context_pool2d(x, logits, same, backend=backend).roll((-3, 2), (2, 3))
    torch.testing.assert_close(moved[..., 8:20, 8:20], expected[..., 8:20, 8:20], rtol=1e-4, atol=1e-5)


def test_offset_far_outside_reads_the_nearest_border():
    x, logits, sigma, _ = make_case(1, 2, 6, 5, sigma=(0.1, 0.1))
    for backend in ('tiled', 'reference'):
        y = context_pool2d(x, logits, sigma, offset=torch.full((1, 1, 2, 1, 1), 1e6), backend=backend)
        torch.testing.assert_close(y, x[..., -1:, -1:].expand_as(y))


def test_opcheck_with_offset_and_shared_supports():
    case = _shared_case(2, 8, 9, 7, 4, 2)
    inputs = [t.requires_grad_() for t in (*case[:3], torch.randn(1, 4, 2, 1, 1))]
    torch.library.opcheck(torch.ops.cpool_vision.context_pool2d_tiled.default, (*inputs[:3], 1, inputs[3]))
    torch.library.opcheck(torch.ops.cpool_vision.context_pool2d_tiled.default, (*inputs[:3], 1))


def test_backends_without_offset_say_so():
    x, logits, sigma, _ = make_case(1, 4, 6, 5)
    offset = torch.zeros(1, 1, 2, 1, 1)
    reasons = available_backends(x, logits, sigma, offset=offset)
    assert reasons['native'] == reasons['triton'] == 'it takes no offset'
    assert reasons['tiled'] is None and reasons['reference'] is None
    with pytest.raises(NotImplementedError, match='takes no offset; pass backend=None'):
        context_pool2d(x, logits, sigma, offset=offset, backend='native')


@pytest.mark.parametrize('shape', [(2, 2), (3, 1, 2, 1, 1), (1, 1, 1, 1, 1), (1, 2, 2, 1, 1), (1, 1, 2, 5, 6)])
def test_offset_of_another_shape_is_refused(shape):
    x, logits, sigma, _ = make_case(2, 4, 6, 5)
    with pytest.raises(ValueError, match=r'offset must have shape \(B or 1, G, 2, Ho or 1, Wo or 1\)'):
        context_pool2d(x, logits, sigma, offset=torch.zeros(shape))


def test_groups_of_supports_must_divide():
    x, logits, sigma, _ = make_case(2, 12, 6, 5, groups=6)
    with pytest.raises(ValueError, match='the 4 groups of sigma must divide the 6 groups of weight_logits'):
        context_pool2d(x, logits, sigma[:, :4])
