"""A layer whose modules were wrapped, replaced, hooked or parametrized computes with what they are now."""
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from cpool_vision.layers import ContextPool2d, TokenContextPool

FORMS = ('map', 'tokens')


def make(form):
    torch.manual_seed(0)
    if form == 'map':
        return ContextPool2d(8, ratio=.4), torch.randn(2, 8, 4, 5)
    return TokenContextPool(8, 1, grid_size=(4, 5), ratio=.4), torch.randn(2, 21, 8)


class Adapter(nn.Module):
    """A low-rank adapter as libraries wrap them: `weight` is that of the layer inside, which is not what is applied."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.down = nn.Conv2d(layer.in_channels, 1, layer.kernel_size, padding=layer.padding, bias=False)
        self.up = nn.Conv2d(1, layer.out_channels, 1, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize('name', ['reduce', 'predict'])
@pytest.mark.parametrize('form', FORMS)
def test_an_adapter_is_applied_and_trained(form, name):
    pool, x = make(form)
    before = pool(x)
    setattr(pool, name, Adapter(getattr(pool, name)))
    y = pool(x)
    y.square().sum().backward()
    assert not torch.allclose(y, before)
    assert getattr(pool, name).up.weight.grad.any()
    wrapped = getattr(pool, name)
    setattr(pool, name, wrapped.base_layer)
    torch.testing.assert_close(pool(x), before)
    assert not torch.allclose(pool.maps(x)[1], torch.ones(()))


@pytest.mark.parametrize('form', FORMS)
def test_peft_is_applied_and_trained(form):
    peft = pytest.importorskip('peft')
    pool, x = make(form)
    config = peft.LoraConfig(r=2, target_modules=['predict'], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, pool)
    plain, _ = make(form)
    y = model(x)
    y.square().sum().backward()
    assert not torch.allclose(y, plain(x))
    assert all(p.grad.any() for name, p in model.named_parameters() if 'lora' in name)


@pytest.mark.parametrize('name', ['reduce', 'act', 'predict'])
@pytest.mark.parametrize('form', FORMS)
def test_hooks_fire_and_take_part(form, name):
    pool, x = make(form)
    expected = pool(x)
    module, seen = getattr(pool, name), []
    handles = [
        module.register_forward_hook(lambda module, args, y: seen.append('forward')),
        module.register_full_backward_hook(lambda module, *grads: seen.append('backward'))]
    y = pool(x.requires_grad_())
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert seen == ['forward', 'backward']
    for handle in handles:
        handle.remove()
    pool(x)
    assert seen == ['forward', 'backward'] and torch.equal(pool(x), expected)
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert not torch.allclose(pool(x), expected)


@pytest.mark.parametrize('form', FORMS)
def test_parametrizations_and_replacements_take_part(form):
    pool, x = make(form)
    before = pool(x)
    parametrizations.weight_norm(pool.predict)
    torch.testing.assert_close(pool(x), before)
    with torch.no_grad():
        pool.predict.parametrizations.weight.original0.mul_(5)
    changed = pool(x)
    assert not torch.allclose(changed, before)
    torch.nn.utils.parametrize.remove_parametrizations(pool.predict, 'weight')
    torch.testing.assert_close(pool(x), changed)

    pool.predict = nn.Conv2d(pool.reduce.out_channels, pool.predict.out_channels, 5, padding=2)
    widened = pool(x)
    with torch.no_grad():
        pool.predict.weight[..., 0, :] += 1
    assert not torch.allclose(pool(x), widened)
    pool.predict.forward = lambda hidden: hidden.new_zeros(2, 2, 4, 5)
    assert not torch.allclose(pool(x), widened)


@pytest.mark.parametrize('form', FORMS)
def test_what_was_changed_is_scripted_and_compiled_so(form):
    pool, x = make(form)
    before = pool(x)
    pool.act.register_forward_hook(lambda module, args, y: 3 * y)
    expected = pool(x)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(torch.compile(pool, fullgraph=True, backend='aot_eager')(x), expected)

    pool, x = make(form)
    pool.act = nn.ReLU()
    torch.testing.assert_close(torch.jit.script(pool)(x), pool(x))
