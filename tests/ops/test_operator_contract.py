"""Layouts, registration, compilation, memory, and what bad input says."""

import pytest
import torch
from ops_testing import FAST_BACKENDS, HOST_BACKENDS, NO_COMPILER, dense, make_case, pool, run
from torch.utils.flop_counter import FlopCounterMode

from cpool_vision.ops import available_backends, context_pool2d, plan

NATIVE_OP = torch.ops.cpool_vision.context_pool2d_native.default
TILED = torch.ops.cpool_vision.context_pool2d_tiled.default


@pytest.mark.parametrize('backend', FAST_BACKENDS)
@pytest.mark.parametrize('size', [(14, 14), (40, 33)])
@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'strided', 'tokens'])
def test_any_layout_gives_the_result_of_contiguous_input(size, layout, backend):
    x, logits, sigma, grad = make_case(2, 8, *size)
    expected = run(pool(backend), (x, logits, sigma, grad))
    if layout == 'channels_last':
        other = x.to(memory_format=torch.channels_last)
    elif layout == 'transposed':
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == 'strided':
        other = torch.zeros(2, 16, size[0], 2 * size[1])[:, ::2, :, ::2]
        other.copy_(x)
    else:
        tokens = torch.cat([torch.zeros(2, 1, 8), x.flatten(2).transpose(1, 2)], 1)
        other = tokens[:, 1:].transpose(1, 2).unflatten(2, size)
    leaf = other.detach().requires_grad_()
    y = context_pool2d(leaf, logits, sigma, backend=backend)
    y.backward(grad)
    torch.testing.assert_close(y, expected['y'], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad, expected['dx'], rtol=1e-5, atol=1e-5)
    if layout in ('channels_last', 'tokens'):
        assert y.stride(1) == 1


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('size,channels_last,groups', [((9, 7), False, 1), ((33, 30), False, 2), ((33, 30), True, 1)])
def test_opcheck(dtype, size, channels_last, groups):
    x, logits, sigma, grad = make_case(2, 4, *size, groups=groups, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, logits, sigma)]
    torch.library.opcheck(TILED, (*inputs, 1))
    outputs = TILED(*inputs, 1)
    torch.library.opcheck(
        torch.ops.cpool_vision.context_pool2d_tiled_backward.default,
        (grad, *(t.detach() for t in (*inputs, outputs[1])), 1))


@pytest.mark.skipif(NO_COMPILER, reason='no C compiler')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('channels_last,groups', [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_opcheck_of_the_kernels_in_c(dtype, channels_last, groups):
    x, logits, sigma, grad = make_case(2, 4, 9, 13, groups=groups, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, logits, sigma)]
    torch.library.opcheck(NATIVE_OP, (*inputs, 1))
    torch.library.opcheck(
        torch.ops.cpool_vision.context_pool2d_native_backward.default, (grad, *(t.detach() for t in inputs), 1))


def test_opcheck_of_the_entry_and_of_the_reference():
    inputs = [t.requires_grad_() for t in make_case(1, 4, 30, 31)[:3]]
    torch.library.opcheck(torch.ops.cpool_vision.context_pool2d.default, tuple(inputs))
    torch.library.opcheck(torch.ops.cpool_vision.context_pool2d_reference.default, tuple(inputs))


@pytest.mark.parametrize('backend', HOST_BACKENDS)
def test_compile_without_graph_breaks(backend):
    torch.compiler.reset()
    compiled = torch.compile(pool(backend), fullgraph=True, dynamic=False, backend='aot_eager')
    case = make_case(2, 4, 30, 31)
    for name, value in run(compiled, case).items():
        torch.testing.assert_close(value, run(pool(backend), case)[name], rtol=1e-4, atol=1e-5)


def test_export_keeps_one_operator():
    class Module(torch.nn.Module):
        def forward(self, x, logits, sigma):
            return context_pool2d(x, logits, sigma)

    inputs = make_case(2, 4, 30, 31)[:3]
    program = torch.export.export(Module(), inputs)
    targets = [n.target for n in program.graph.nodes if 'cpool_vision' in str(n.target)]
    assert len(targets) == 1
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


def test_a_trace_takes_maps_of_another_size():
    class Module(torch.nn.Module):
        def forward(self, x):
            maps = torch.ops.cpool_vision.supports_and_logits(x, 1, 1, 1, 0., 0.25, 0.1)
            return torch.ops.cpool_vision.context_pool2d(x, *maps)

    traced = torch.jit.trace(Module(), make_case(2, 4, 9, 8)[0])
    other = make_case(1, 4, 21, 12)[0]
    torch.testing.assert_close(traced(other), Module()(other))


class Wrapping(torch.Tensor):
    """A subclass of the kind of fastai's: a method of its own wraps what it makes."""

    def new_empty(self, *size, **kwargs):
        return self.as_subclass(torch.Tensor).new_empty(*size, **kwargs).as_subclass(Wrapping)


@pytest.mark.parametrize('backend', HOST_BACKENDS)
def test_outputs_of_a_tensor_subclass_may_be_changed_in_place(backend):
    case = make_case(2, 4, 20, 21)

    def change(x, logits, sigma, cls):
        y = context_pool2d(x.as_subclass(cls), logits, sigma, backend=backend)
        assert type(y) is cls
        y += x.sum()
        return y.as_subclass(torch.Tensor)

    got, expected = (run(lambda *inputs, cls=cls: change(*inputs, cls), case) for cls in (Wrapping, torch.Tensor))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize('backend', HOST_BACKENDS)
def test_flops_are_those_of_the_definition(backend):
    case = make_case(2, 4, 30, 31, groups=2)
    with FlopCounterMode(display=False) as counter:
        run(pool(backend), case)
    assert counter.get_total_flops() == 3 * 2 * 2 * 4 * 930 ** 2


@pytest.mark.parametrize('backend', HOST_BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_rounds_the_features_and_nothing_else(backend, dtype):
    x, logits, sigma, grad = make_case(2, 4, 30, 31, dtype=dtype)

    def under_autocast(*args):
        with torch.autocast('cpu', torch.bfloat16):
            return pool(backend)(*args)

    half = grad.bfloat16()
    expected = run(pool(backend), (x.bfloat16(), logits.float(), sigma.float(), half))
    got = run(under_autocast, (x, logits, sigma, half))
    assert got['y'].dtype == torch.bfloat16 and torch.equal(got['y'], expected['y'])
    for name, value in (('dx', x), ('dlogits', logits), ('dsigma', sigma)):
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], expected[name].to(value.dtype))


@pytest.mark.parametrize('size', [(14, 14), (40, 33)])
def test_training_goes_on_after_inference_mode(size):
    from cpool_vision.ops import workspace
    workspace.clear()
    case = make_case(2, 4, *size)
    with torch.inference_mode():
        expected = context_pool2d(*case[:3], backend='tiled')
    torch.testing.assert_close(run(pool('tiled'), case)['y'], expected)


def test_second_derivatives_are_refused_by_tiled_and_given_by_reference():
    x, logits, sigma, _ = make_case(1, 2, 6, 5, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, logits, sigma)]
    first = torch.autograd.grad(context_pool2d(*inputs, backend='tiled').square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        first.sum().backward()
    assert torch.autograd.gradgradcheck(pool('reference'), tuple(inputs))


def test_only_needed_gradients_are_returned():
    x, logits, sigma, grad = make_case(1, 4, 30, 31)
    logits.requires_grad_()
    context_pool2d(x, logits, sigma).backward(grad)
    torch.testing.assert_close(logits.grad, run(dense(), (x, logits, sigma, grad))['dlogits'], rtol=1e-4, atol=1e-4)


def _extra_memory(size: int, backend: str) -> float:
    """Peak memory of forward and backward beyond the inputs, in bytes of `x`, counted by the allocator."""
    from cpool_vision.ops import workspace
    workspace.clear()
    case = make_case(2, 48, size, size, sigma=(0.5, size / 12))
    x, logits, sigma = (t.requires_grad_() for t in case[:3])
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        context_pool2d(x, logits, sigma, backend=backend).backward(case[3])
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (x.numel() * 4)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_memory_is_linear_in_pixels(backend):
    small, large = _extra_memory(64, backend), _extra_memory(128, backend)
    dense_pairs = 128 ** 2 / 48
    assert 1.9 < large < small * 1.1
    assert large < dense_pairs / 10


def test_backends_say_why_not():
    x, logits, sigma, _ = make_case(1, 4, 6, 5)
    reasons = available_backends(x, logits, sigma)
    assert list(reasons) == ['triton', 'native', 'tiled', 'reference']
    assert reasons['tiled'] is None and reasons['reference'] is None
    x8 = x.to(torch.float8_e4m3fn)
    reasons = available_backends(x8, logits, sigma)
    assert 'float8' in reasons['tiled']
    with pytest.raises(NotImplementedError, match='float8.*backend=None'):
        context_pool2d(x8, logits, sigma, backend='tiled')


def test_explicit_backend_really_runs(monkeypatch):
    from cpool_vision.ops import reference
    calls = []
    offsets = reference.squared_offsets
    monkeypatch.setattr(reference, 'squared_offsets', lambda *a: calls.append('reference') or offsets(*a))
    case = make_case(1, 4, 30, 31)[:3]
    context_pool2d(*case, backend='tiled')
    context_pool2d(*case)
    assert calls == []
    context_pool2d(*case, backend='reference')
    assert calls == ['reference'] * 2


BAD = [
    (lambda x, w, s: (x[0], w, s), {}, ValueError, r'x must have 4 dimensions.*\(4, 6, 5\)'),
    (lambda x, w, s: (x, w[0], s), {}, ValueError, 'weight_logits must have 4 dimensions'),
    (lambda x, w, s: (x.int(), w, s), {}, TypeError, r'x must be floating point, got torch.int32.*x.float\(\)'),
    (lambda x, w, s: (x, w, s.long() + 1), {}, TypeError, 'sigma must be floating point, got torch.int64'),
    (lambda x, w, s: (x.numpy(), w, s), {}, TypeError, 'x must be a tensor, got ndarray'),
    (lambda x, w, s: (x, w[..., 1:], s), {}, ValueError, r'weight_logits must have shape \(2, 1, 6, 5\)'),
    (lambda x, w, s: (x, w, s[..., 1:]), {}, ValueError, r'sigma must have shape \(2, 1, 6, 5\).*got \(2, 1, 6, 4\)'),
    (lambda x, w, s: (x, w, s), {'stride': 2}, ValueError, r'sigma must have shape \(2, 1, 3, 3\)'),
    (lambda x, w, s: (x, w.expand(-1, 3, -1, -1), s), {}, ValueError, '3 groups .* divide the 4 channels'),
    (lambda x, w, s: (x, w[:, :0], s), {}, ValueError, '0 groups'),
    (lambda x, w, s: (x, w, s), {'stride': 0}, ValueError, 'stride must be >= 1, got stride=0'),
    (lambda x, w, s: (x, w, s), {'stride': 1.0}, TypeError, 'stride must be an int, got 1.0'),
    (lambda x, w, s: (x, w, s), {'backend': 'cudnn'}, ValueError, "backend='cudnn'; choose one of triton, native"),
    (lambda x, w, s: (x, w, s * 0), {}, ValueError, r'sigma must be > 0, got min=0.0; map it'),
    (lambda x, w, s: (x, w, s - 9), {}, ValueError, r'sigma must be > 0, got min=-'),
    (lambda x, w, s: (x, w, s / 0 * 0), {}, ValueError, r'sigma must be > 0, got min=nan'),
    (lambda x, w, s: (x, w, s.to('meta')), {}, ValueError, 'sigma is on meta but x on cpu; move them to one device'),
    (lambda x, w, s: (x[:, :, :0], w[:, :, :0], s[:, :, :0]), {}, ValueError, 'x must have pixels'),
]


@pytest.mark.parametrize('change,kwargs,error,message', BAD, ids=[b[3][:40] for b in BAD])
def test_bad_input_names_value_and_remedy(change, kwargs, error, message):
    x, logits, sigma, _ = make_case(2, 4, 6, 5)
    with pytest.raises(error, match=message):
        context_pool2d(*change(x, logits, sigma), **kwargs)


def test_tolerances_cover_the_supported_dtypes():
    assert set(plan.TOLERANCE) == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
