"""The benchmark beside busy loops: its table, and that no loop is left."""
import subprocess

import pytest

from benchmarks import busy


def test_losses_are_ratios_of_the_same_process_under_load_and_alone(monkeypatch):
    def run(threads, loops, policy, seconds):
        return {'operator': 2. * (1 + loops) / threads, 'product': 1. + loops}
    monkeypatch.setattr(busy, 'run', run)
    monkeypatch.setattr(busy.os, 'sched_getaffinity', lambda _: range(2))
    assert busy.make_table().splitlines()[2:] == [
        '| 1 | not set | 3.0 | 3.0 | 1.00 |',
        '| 2 | not set | 3.0 | 3.0 | 0.50 |',
        '| 2 | passive | 3.0 | 3.0 | 0.50 |']


@pytest.mark.slow
def test_busy_loops_end_with_the_measurement(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
    monkeypatch.setattr(busy.subprocess, 'Popen', Popen)
    figures = busy.run(1, 1, None, .1)
    assert min(figures.values()) > 0 and all(each.poll() is not None for each in started)
