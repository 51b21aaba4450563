import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def _poisoned(function):
    def create(*args, **kwargs):
        out = function(*args, **kwargs)
        if type(out) is torch.Tensor and out.device.type == 'cpu' and out.is_floating_point():
            out.fill_(float('nan'))
        return out
    return create


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialized memory reads as NaN, so that an element nobody wrote cannot pass for a result."""
    from cpool_vision.ops import workspace
    workspace.clear()
    for owner, name in ((torch, 'empty'), (torch, 'empty_like'), (torch.Tensor, 'new_empty')):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield
    workspace.clear()
