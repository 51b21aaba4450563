"""How many operators a layer runs each way: on a GPU every one is a launch at least, and passes over memory."""
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpool_vision.layers import ContextPool2d, Subsample2d, TokenContextPool
from cpool_vision.ops import native

pytestmark = pytest.mark.skipif('no C compiler' in (native.why_not() or ''), reason='no C compiler')
# They make no pass over memory: the storage stays, or is not written.
FREE = {'view', '_unsafe_view', 't', 'transpose', 'permute', 'slice', 'detach', 'alias', 'empty', 'new_empty_strided'}


class Operators(TorchDispatchMode):
    """Names of the operators that run, less those that cost nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split('::')[1].split('.')[0]
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operators(pool, x, autocast):
    """Names of the operators of a forward and of a backward pass."""
    x.requires_grad_()
    with Operators() as forward, torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = pool(x)
    grad = torch.ones_like(y)
    with Operators() as backward:
        y.backward(grad)
    return forward.names, backward.names


def make(form, **kwargs):
    if form == 'tokens':
        return TokenContextPool(32, 1, grid_size=(4, 4), groups=4, **kwargs), torch.randn(2, 17, 32)
    if form == 'strided':
        kwargs.update(stride=2, base=Subsample2d(2) if kwargs.get('gate') else None)
    layout = torch.contiguous_format if form == 'nchw' else torch.channels_last
    return (t.to(memory_format=layout) for t in (ContextPool2d(32, groups=4, **kwargs), torch.randn(2, 32, 8, 8)))


# Most operators forward and backward, by gate and autocast.
BOUNDS = {(False, False): (1, 2), (False, True): (2, 3), (True, False): (1, 2), (True, True): (2, 4)}
# The gradient of a base, of every second pixel, is written and added.
STRIDED = {(True, False): (1, 5), (True, True): (2, 6)}


@pytest.mark.parametrize('form', ['tokens', 'nchw', 'nhwc', 'strided'])
@pytest.mark.parametrize('gate,autocast', list(BOUNDS))
def test_a_layer_runs_no_more_operators_than_stated(form, gate, autocast):
    found = operators(*make(form, gate=gate), autocast)
    bounds = BOUNDS | STRIDED if form == 'strided' else BOUNDS
    assert all(0 < len(names) <= bound for names, bound in zip(found, bounds[gate, autocast], strict=True)), found


@pytest.mark.parametrize('family', ['swin_micro_cpool_patch2_window4_32', 'vit_micro_cpool_patch4_32',
                                    'convnext_micro_cpool_32', 'poolformer_micro_cpool_32', 'resnet_micro_cpool_32'])
def test_a_pool_of_every_family_is_one_operator(family):
    """Whatever shape and strides the features of a family have."""
    model = timm.create_model(family)
    pools = sum(isinstance(module, ContextPool2d) for module in model.modules())
    with Operators() as forward, torch.autocast('cpu', torch.bfloat16):
        y = model(torch.randn(1, 3, 32, 32))
    with Operators() as backward:
        y.float().sum().backward()
    of_pools = [[name for name in seen.names if 'pool' in name and '2d' not in name] for seen in (forward, backward)]
    assert of_pools == [['context_pool_layer_fused'] * pools, ['context_pool_layer_fused_backward'] * pools]


def test_a_layer_of_torch_s_operators_runs_more():
    """Negative control: what cannot be fused is counted one by one."""
    plain = operators(*make('tokens', act_layer=torch.nn.SiLU), False)
    assert all(len(names) > bound for names, bound in zip(plain, BOUNDS[False, False], strict=True)), plain
