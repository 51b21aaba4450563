import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cpool_vision.profile import measure
from cpool_vision.profile.cases import Case
from cpool_vision.profile.measure import FORWARD, FORWARD_BACKWARD, peak_memory, quantiles, run_pass, times_in_turn

CASE = Case((1, 4, 16, 16), (0.5, 1.0))


def test_quantiles() -> None:
    assert quantiles([0.004, 0.001, 0.002, 0.003, 0.005]) == {
        'median_ms': pytest.approx(3), 'p20_ms': pytest.approx(2), 'p80_ms': pytest.approx(5)}


def test_passes_with_and_without_gradients() -> None:
    seen = []

    def function(x: Tensor, logits: Tensor, sigma: Tensor) -> Tensor:
        y = x * logits.mean() * sigma.mean()
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(grad.clone()))
        seen.append(y.requires_grad)
        return y

    inputs, grad = CASE.inputs()
    run_pass(function, inputs, grad, False)
    run_pass(function, inputs, grad, True)
    assert seen[:2] == [False, True] and torch.equal(seen[2], grad) and len(seen) == 3
    assert all(t.grad is None and not t.requires_grad for t in inputs)


def test_implementations_run_in_turn_and_the_first_turn_does_not_count() -> None:
    order = []
    functions = {name: lambda x, *_, name=name: order.append(name) or x * 1 for name in 'ab'}
    inputs, grad = CASE.inputs()
    times, dropped = times_in_turn(functions, inputs, grad, (FORWARD, FORWARD_BACKWARD), 3)
    assert order == ['a', 'a', 'b', 'b'] * 4 and not dropped
    assert all(len(taken) == 3 and min(taken) > 0 for passes in times.values() for taken in passes.values())


def test_slow_implementations_stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {'slow': 6.0, 'fast': 0.1}

    def timer(call):
        seconds = taken[call.args[0].__name__]
        return lambda: seconds

    def slow(x, *_):
        return x

    def fast(x, *_):
        return x

    monkeypatch.setattr(measure, 'timer_for', lambda device: timer)
    times, _ = times_in_turn({'slow': slow, 'fast': fast}, *CASE.inputs(), (FORWARD,), 9, limit_s=10)
    assert len(times['slow'][FORWARD]) == 3 and len(times['fast'][FORWARD]) == 9


def test_running_out_of_memory_drops_the_implementation_alone() -> None:
    def too_large(*_):
        raise torch.OutOfMemoryError('CUDA out of memory')

    def broken(*_):
        raise RuntimeError('wrong')

    inputs, grad = CASE.inputs()
    times, dropped = times_in_turn({'large': too_large, 'ok': lambda x, *_: x}, inputs, grad, (FORWARD,), 2)
    assert list(times) == ['ok'] and dropped == {'large': 'it ran out of memory'}
    with pytest.raises(RuntimeError, match='wrong'):
        times_in_turn({'broken': broken}, inputs, grad, (FORWARD,), 2)


@pytest.mark.parametrize('copies', [1, 4])
def test_peak_memory_counts_what_is_held_at_once(copies: int, capfd: pytest.CaptureFixture[str]) -> None:
    def function(x: Tensor, *_: Tensor) -> Tensor:
        held = [x + i for i in range(copies)]
        for _ in range(3):  # freed at once, so it adds one copy
            (x * 2).sum()
        return held[0]

    inputs, grad = CASE.inputs()
    assert peak_memory(function, inputs, grad, backward=False) == pytest.approx(copies + 1, abs=0.1)
    # the profiler's own messages are hidden, those of others are not
    os.write(2, b'heard')
    print('too', file=sys.stderr)
    assert capfd.readouterr().err == 'heardtoo\n'


def test_cuda_times_are_events_from_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append('record')

        def synchronize(self) -> None:
            log.append('synchronize')

        def elapsed_time(self, end: 'Event') -> float:
            return 2.5

    flush = SimpleNamespace(zero_=lambda: log.append('flush'))
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: torch.no_grad())
    monkeypatch.setattr(torch, 'empty', lambda *_, **__: flush)
    timer = measure.timer_for(torch.device('cuda:1'))
    wait = timer(lambda: log.append('call'))
    assert log == ['flush', 'record', 'call', 'record']
    assert wait() == pytest.approx(0.0025) and log[-1] == 'synchronize'


def test_cuda_peak_is_over_what_was_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {'now': 100, 'peak': 9999}
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: held['now'])
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda device: held.update(peak=held['now']))
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: held['peak'])
    assert measure._cuda_peak(lambda: held.update(peak=740), torch.device('cuda')) == 640


def test_machine_names_versions_and_commit() -> None:
    found = measure.machine()
    assert set(found) == {'cpu', 'threads', 'torch', 'cpool_vision', 'commit'}
    assert found['torch'] == torch.__version__ and found['threads'] == torch.get_num_threads()
    assert found['commit'] is None or len(found['commit']) == 40


def test_an_installed_package_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(measure, '__file__', str(tmp_path / 'cpool_vision' / 'profile' / 'measure.py'))
    assert measure._commit() is None
    # not even inside the working tree of another repository
    monkeypatch.setattr(measure.subprocess, 'run', lambda *_, **__: SimpleNamespace(stdout=f'{tmp_path.parent}\nabc\n'))
    assert measure._commit() is None
    monkeypatch.setattr(measure.subprocess, 'run', lambda *_, **__: SimpleNamespace(stdout=f'{tmp_path}\nabc\n'))
    assert measure._commit() == 'abc'
