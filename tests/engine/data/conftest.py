"""Training loaders."""
from collections.abc import Callable
from typing import Any

import pytest
from loader_tools import Build, builder


@pytest.fixture
def build(image_root: str, train_args: Callable[..., Any]) -> Build:
    """Builds training loaders."""
    return builder(image_root, train_args)
