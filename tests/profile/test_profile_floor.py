import dataclasses

import pytest
import torch

from cpool_vision.ops import TOLERANCE
from cpool_vision.profile import floor
from cpool_vision.profile.cases import Case


@pytest.fixture
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that copies 10 GB/s and multiplies 100 GFLOP/s."""
    monkeypatch.setattr(floor, 'copy_bandwidth', lambda device, size: 1e10)
    monkeypatch.setattr(floor, 'gemm_rate', lambda device, dtype: 1e11)


def floor_of(case: Case) -> dict:
    return floor.floor(case, case.inputs()[0])


@pytest.mark.parametrize('stride, groups, dtype', [(1, 1, 'float32'), (2, 2, 'float32'), (1, 2, 'float64')])
def test_needed_pairs_are_the_fewest_that_keep_the_weight(stride: int, groups: int, dtype: str) -> None:
    case = Case((1, 4, 7, 6), (0.2, 1.5), groups, stride, dtype)
    inputs = case.inputs()[0]
    _, logits, sigma = (t[0].double() for t in inputs)
    tolerance = TOLERANCE[case.torch_dtype]
    total = cells = 0
    for g in range(groups):
        for row in range(sigma.shape[1]):
            for col in range(sigma.shape[2]):
                y, x = (stride * n + (stride - 1) / 2 for n in (row, col))
                weights = sorted((
                    float(torch.exp(logits[g, i, j] - ((i - y) ** 2 + (j - x) ** 2) / (2 * sigma[g, row, col] ** 2)))
                    for i in range(7) for j in range(6)), reverse=True)
                whole, kept = sum(weights), 0
                while sum(weights[kept:]) > tolerance * whole:
                    kept += 1
                total, cells = total + kept, cells + 1
    assert floor.needed_pairs(case, inputs) == pytest.approx(total / cells)


def test_needed_pairs_at_the_extremes() -> None:
    for sigma, expected in ((1e-3, 1), (1e6, 63)):
        case = Case((2, 3, 9, 7), (sigma, sigma))
        assert floor.needed_pairs(case, case.inputs()[0]) == expected


def test_needed_pairs_of_a_large_call_come_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((4, 1, 24, 24), (0.5, 2.0))
    inputs = case.inputs()[0]
    exact = floor.needed_pairs(case, inputs)
    monkeypatch.setattr(floor, '_SAMPLED_PAIRS', 24 ** 2 * 500)
    sampled = floor.needed_pairs(case, inputs)
    assert sampled != exact and sampled == pytest.approx(exact, rel=0.1)


def test_bytes_and_flops_by_hand() -> None:
    case = Case((2, 8, 6, 4), (1.0, 1.0), groups=2, stride=2, dtype='bfloat16')
    inputs = case.inputs()[0]
    x, logits, sigma, y = 2 * 8 * 24 * 2, 2 * 2 * 24 * 4, 2 * 2 * 6 * 4, 2 * 8 * 6 * 2
    assert floor.moved_bytes(case, inputs) == x + logits + sigma + y
    assert floor.multiplied_flops(case, 10.0) == 2 * (2 * 8 * 6) * 10
    both = dataclasses.replace(case, backward=True)
    # read again with the gradient of the output, and as many gradients written
    assert floor.moved_bytes(both, inputs) == (x + logits + sigma + y) + (x + logits + sigma) * 2 + y
    assert floor.multiplied_flops(both, 10.0) == 3 * floor.multiplied_flops(case, 10.0)


@pytest.mark.usefixtures('fixed_rates')
def test_floor_grows_with_the_map_and_falls_with_the_supports() -> None:
    case = Case((1, 16, 16, 16), (1.0, 3.0))
    by_size = [floor_of(case.with_side(side))['ms'] for side in (8, 12, 16, 24)]
    assert by_size == sorted(by_size) and by_size[0] < by_size[-1] / 4
    by_support = [floor_of(case.with_mean_support(mean))['ms'] for mean in (3.0, 2.0, 1.0, 0.5)]
    assert by_support == sorted(by_support, reverse=True) and by_support[0] > 2 * by_support[-1]
    assert floor_of(dataclasses.replace(case, backward=True))['ms'] > floor_of(case)['ms']


@pytest.mark.usefixtures('fixed_rates')
def test_floor_is_the_larger_of_both_times() -> None:
    for sigma, bound in ((1e-3, 'memory'), (100.0, 'arithmetic')):
        found = floor_of(Case((1, 16, 16, 16), (sigma, sigma)))
        both = {'memory': found['bytes'] / 1e10 * 1e3, 'arithmetic': found['flops'] / 1e11 * 1e3}
        assert found['bound'] == bound == max(both, key=both.get)
        assert found['ms'] == pytest.approx(max(both.values()))


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('_RATE_SECONDS', 0.01), ('_MIN_RATE_RUNS', 2), ('_GEMM_SIDE', {'cpu': 128})):
        monkeypatch.setattr(floor, name, value)
    assert 1e7 < floor.copy_bandwidth('cpu', 2 ** 20) < 1e13
    assert 1e7 < floor.gemm_rate.__wrapped__('cpu', torch.bfloat16) < 1e14
    # A call that takes a fixed time gives a known rate.
    monkeypatch.setattr(floor, '_best_time', lambda call, device: 0.5)
    assert floor.copy_bandwidth('cpu', 2 ** 22) == 2 ** 23
    assert floor.gemm_rate.__wrapped__('cpu', torch.float32) == 4 * 128 ** 3
