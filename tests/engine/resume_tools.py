"""Runs that break off, and the comparison of what they leave."""
import csv
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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


def watch_calls(patch: pytest.MonkeyPatch, act: Callable[[str], None], *calls: tuple[Any, str]) -> None:
    """Lets `act` happen before each call of functions, given as (module, name), with the name."""
    def wrap(place: Any, name: str) -> None:
        real = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            act(name)
            return real(*args, **kwargs)

        patch.setattr(place, name, call)

    for place, name in calls:
        wrap(place, name)


def die_at_every_call(
        folder: Path, start: str, count_calls: Callable[[pytest.MonkeyPatch, Callable[[str], None]], None],
        save: Callable[[str], None]) -> Iterator[tuple[str, bool]]:
    """Copies of `start`, each with a save broken off one call later than in the copy before.

    A child process saves and dies without any clean-up, as by SIGKILL, before a call that `count_calls` watches.

    Yields:
        Each copy, and whether the save in it was completed; that one is the last.
    """
    died, done = 0, False
    while not done:
        copy = str(folder / f'{died}')
        shutil.copytree(start, copy, symlinks=True)
        child = os.fork()
        if child == 0:
            seen = [0]

            def act(_: str, seen: list[int] = seen, last: int = died) -> None:
                if seen[0] == last:
                    os._exit(9)
                seen[0] += 1

            try:
                count_calls(pytest.MonkeyPatch(), act)
                save(copy)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        done = status == 0
        yield copy, done
        died += 1


def flatten(value: Any, name: str = '') -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(flatten(item, f'{name}.{key}'))
    return flat


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
