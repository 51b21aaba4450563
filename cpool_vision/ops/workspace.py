"""Temporaries that live from call to call, one set per thread: touching fresh pages can cost more than arithmetic."""
import math
import threading

import torch
from torch import Tensor


class _Workspace(threading.local):

    def __init__(self) -> None:
        self.slots: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_workspace = _Workspace()


def take(slot: str, like: Tensor, *shape: int) -> Tensor:
    """Uninitialized memory for one temporary, valid until the slot is taken again in the same thread.

    Callers bound the size by a chunk of the work, never by the batch.
    """
    key = (slot, like.dtype, like.device)
    size = math.prod(shape)
    held = _workspace.slots.get(key)
    if held is None or held.numel() < size:
        # What inference mode creates could not be written to outside it.
        with torch.inference_mode(False):
            held = _workspace.slots[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return held[:size].view(shape)


def clear() -> None:
    """Gives this thread's memory back."""
    _workspace.slots.clear()
