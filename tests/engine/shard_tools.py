"""Checkpoints in parts that threads write, without a process group, and the damage done to them."""
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from divided_tools import in_threads

from cpool_vision.engine.checkpoints.folder_store import FolderStore
from cpool_vision.engine.checkpoints.parts import Part
from cpool_vision.engine.checkpoints.position import Position
from cpool_vision.engine.checkpoints.resume import find_newest
from cpool_vision.engine.checkpoints.saver import CheckpointSaver
from cpool_vision.engine.checkpoints.seal import seal_json

SHAPES = {'a': ((5, 3), torch.float32), 'b': ((4,), torch.bfloat16), 'c': ((1, 2), torch.int64),
          'd': ((6, 2, 2), torch.float64), 'e': ((3,), torch.bool)}


def whole_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, 2 if dtype is torch.bool else 1000, shape, generator=generator).to(dtype)
            for name, (shape, dtype) in SHAPES.items()}


def divided(rank: int, count: int, shift: int = 0) -> dict[str, Any]:
    """The part of one process, and what all have: a scalar and a tensor that is not divided."""
    tree: dict[str, Any] = {'whole': {0: torch.tensor(2.5), 'x.y': torch.tensor([[float('nan'), -0.0]])}}
    for name, tensor in whole_tensors().items():
        tensor = tensor if tensor.dtype is torch.bool else tensor + shift
        offsets = tuple(min(len(tensor), each * -(-len(tensor) // count)) for each in range(count + 1))
        local = tensor[offsets[rank]:offsets[rank + 1]]
        tree[name] = Part(local, tuple(tensor.shape), 0, offsets)
    return tree


class State:
    """What `CheckpointSaver` asks of a `TrainState`."""

    def __init__(self, tree: dict[str, Any], at: Any) -> None:
        self.tree, self.at = tree, at

    def to_checkpoint(self, epoch: int) -> dict[str, Any]:
        return {'epoch': epoch, 'version': 2, 'at': self.at, **self.tree}


def save_steps(folder: str, steps: Sequence[tuple[str, int, int]], count: int = 2, fresh: bool = True) -> None:
    """Saves by so many processes, which are threads; steps are (kind, epoch, batch)."""
    def work(rank: int, exchange: Any) -> None:
        store = FolderStore(folder, rank, count, exchange)
        saver = CheckpointSaver(folder, 1, store=store) if rank == 0 else None
        if saver is not None and not fresh:
            found = find_newest(folder)
            assert found.content is not None
            saver.restore(found.content, found.path)
        for kind, epoch, batch in steps:
            tree = store.stage(divided(rank, count, epoch * 10 + batch))
            exchange([0])
            if saver is not None:
                state: Any = State(tree, [epoch, batch])
                if kind == 'epoch':
                    saver.save(state, epoch, float(epoch))
                else:
                    saver.save_recovery(state, Position(epoch, batch))
            exchange([0])

    in_threads(count, work)


SOME = [('recovery', 0, 2), ('epoch', 0, 4), ('recovery', 1, 2), ('epoch', 1, 4), ('recovery', 2, 2),
        ('recovery', 2, 4)]


def save_one(folder: str, count: int = 3) -> str:
    save_steps(folder, [('epoch', 0, 0)], count)
    return os.path.join(folder, 'last.sharded')


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def alter(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def lose(path: pathlib.Path) -> None:
    path.unlink()


def link(path: pathlib.Path) -> None:
    path.rename(path.parent.parent / 'elsewhere')
    path.symlink_to(path.parent.parent / 'elsewhere')


def reseal(path: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alters the index as someone would who knows how it is sealed."""
    index = json.loads((path / 'index.json').read_text())
    change(index['content'])
    (path / 'index.json').write_bytes(seal_json(index['content'], index['seal']['serial']))
