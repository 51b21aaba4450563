"""How many operators a layer runs each way: on a GPU every one is a launch at least, and passes over memory."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpool_vision.layers import ContextPool2d, TokenContextPool
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
    layout = torch.channels_last if form == 'nhwc' else torch.contiguous_format
    return (t.to(memory_format=layout) for t in (ContextPool2d(32, groups=4, **kwargs), torch.randn(2, 32, 8, 8)))


# Most operators forward and backward.
BOUNDS = {
    ('tokens', False): (1, 3), ('tokens', True): (2, 3),
    ('nchw', False): (5, 6), ('nchw', True): (10, 15),
    ('nhwc', False): (5, 8), ('nhwc', True): (10, 17),
}


@pytest.mark.parametrize('form,autocast', list(BOUNDS))
def test_a_layer_runs_no_more_operators_than_stated(form, autocast):
    found = operators(*make(form), autocast)
    assert all(0 < len(names) <= bound for names, bound in zip(found, BOUNDS[form, autocast], strict=True)), found


def test_a_layer_of_torch_s_operators_runs_more():
    """Negative control: what cannot be fused is counted one by one."""
    plain = operators(*make('tokens', act_layer=torch.nn.SiLU), False)
    assert all(len(names) > bound for names, bound in zip(plain, BOUNDS['tokens', False], strict=True)), plain
