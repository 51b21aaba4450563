"""Runs that break off, and the comparison of what they leave."""
import csv
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.kill_test import flatten
from cpool_vision.engine.train.checkpointer import Checkpointer


class Crash(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def crash_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Lets the run crash after so many updates, counted over epochs from 1."""
    real, seen = Checkpointer.after_update, [0]

    def after_update(self: Checkpointer, *args: Any) -> None:
        real(self, *args)
        seen[0] += 1
        if seen[0] == update:
            raise Crash

    monkeypatch.setattr(Checkpointer, 'after_update', after_update)


def break_off(run: Callable[[], Any], update: int) -> None:
    """Starts a run that crashes after so many updates."""
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, update)
        with pytest.raises(Crash):
            run()


def unequal(one: dict[str, Any], two: dict[str, Any], leave_out: tuple[str, ...] = ('args', 'saver')) -> list[str]:
    """Entries of two checkpoints that differ in a single bit."""
    left, right = (flatten({k: v for k, v in content.items() if k not in leave_out}) for content in (one, two))
    wrong = sorted(set(left) ^ set(right))
    for name in set(left) & set(right):
        a, b = left[name], right[name]
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            wrong.append(name)
    return wrong


def rows(folder: str, timed: bool = False) -> list[dict[str, str]]:
    """Rows of summary.csv, without what a clock measured."""
    with open(os.path.join(folder, 'summary.csv'), newline='', encoding='utf-8') as file:
        return [{key: value for key, value in row.items() if timed or 'per_sec' not in key}
                for row in csv.DictReader(file)]
