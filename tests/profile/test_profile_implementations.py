import dataclasses

import pytest
import torch

from cpool_vision.ops import BACKENDS, context_pool2d_reference
from cpool_vision.profile import implementations as module
from cpool_vision.profile.cases import Case
from cpool_vision.profile.implementations import BASELINES, NAMES, implementations, refusals, sdpa_augmented


@pytest.mark.parametrize('stride, groups, dtype, tolerance', [
    (1, 1, 'float32', 1e-4), (2, 2, 'float32', 1e-4), (3, 1, 'float64', 1e-10), (1, 2, 'bfloat16', 1e-2)])
def test_attention_computes_the_pool(stride: int, groups: int, dtype: str, tolerance: float) -> None:
    case = Case((2, 4, 8, 7), (0.4, 2.0), groups, stride, dtype)
    inputs = case.inputs()[0]
    expected = context_pool2d_reference(*inputs, stride)
    got = sdpa_augmented(*inputs, stride)
    assert got.dtype == expected.dtype and float((got - expected).abs().max()) < tolerance
    wrong = sdpa_augmented(inputs[0], inputs[1], 1.1 * inputs[2], stride)
    assert float((wrong - expected).abs().max()) > tolerance


def test_every_implementation_gives_the_output_shape_and_gradients() -> None:
    case = Case((2, 4, 9, 6), (0.4, 2.0), 2, 2, backward=True)
    inputs, grad = case.inputs()
    functions = implementations(case)
    assert tuple(functions) == NAMES and set(NAMES) == {*BACKENDS, *BASELINES}
    for name, function in functions.items():
        if refusals(case, inputs)[name] is None:
            x, *maps = (t.clone().requires_grad_() for t in inputs)
            y = function(x, *maps)
            assert y.shape == grad.shape, name
            y.backward(grad)
            assert x.grad.abs().sum() > 0, name


def test_all_pairs_are_refused_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((2, 4, 32, 32), (0.4, 2.0))
    inputs = case.inputs()[0]
    needed = 2 * 32 ** 4 * 4 * 3
    for free, refused in ((needed * 2, False), (needed // 2, True), (None, False)):
        monkeypatch.setattr(module, 'free_memory', lambda device, free=free: free)
        reasons = refusals(case, inputs)
        assert tuple(reasons) == NAMES and reasons['tiled'] is None and reasons['depthwise_7x7'] is None
        for name in ('reference', 'sdpa_augmented'):
            assert (reasons[name] is not None) == refused
    monkeypatch.setattr(module, 'free_memory', lambda device: needed * 1.5)
    assert refusals(case, inputs)['reference'] is None
    # gradients hold more
    assert 'all pairs take about' in refusals(dataclasses.replace(case, backward=True), inputs)['reference']


def test_reasons_are_those_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((1, 4, 6, 6), (0.4, 2.0), stride=2, backward=True)

    def available(x, logits, sigma, stride):
        assert x.requires_grad and stride == 2
        return {'reference': None, 'tiled': 'no such instruction'}

    monkeypatch.setattr(module, 'available_backends', available)
    assert refusals(case, case.inputs()[0])['tiled'] == 'no such instruction'


def test_inputs_follow_the_case() -> None:
    case = Case((2, 6, 30, 22), (0.5, 3.0), 3, 2, 'bfloat16', channels_last=True)
    (x, logits, sigma), grad = case.inputs()
    assert x.shape == (2, 6, 30, 22) and x.dtype == torch.bfloat16 and grad.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert logits.shape == (2, 3, 30, 22) and sigma.shape == (2, 3, 15, 11) and grad.shape == (2, 6, 15, 11)
    assert logits.dtype == sigma.dtype == torch.float32
    assert 0.5 <= float(sigma.min()) < 0.7 and 2.8 < float(sigma.max()) <= 3.0
    smooth = dataclasses.replace(case, smooth=True).inputs()[0][2]
    assert float(smooth.min()) >= 0.5 and float(smooth.max()) <= 3.0
    steps = [float(t.diff(dim=-1).abs().mean()) for t in (smooth, sigma)]
    assert steps[0] < steps[1] / 3


def test_cases_are_scaled() -> None:
    case = Case((2, 6, 30, 22), (0.5, 1.5))
    assert case.with_side(9).shape == (2, 6, 9, 9) and case.with_side(9).sigma == case.sigma
    assert case.mean_support == 1 and case.with_mean_support(4).sigma == (2, 6)
