"""What holds for every test."""
import gc
import os
from collections.abc import Generator, Iterator

import pytest

gc.disable()  # torch and timm make a million objects that stay: looking for garbage among them takes seconds
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test waits for the hub of weights
if 'PYTEST_XDIST_WORKER' in os.environ:  # before anything imports NumPy or PyTorch; subprocesses inherit it
    os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(autouse=True)
def formats_of_pillow() -> Iterator[None]:
    """Some sets limit the image formats of the process; the next test knows all again."""
    from PIL import Image
    Image.init()
    former = list(Image.ID)
    yield
    Image.ID[:] = former


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What was imported by then is left out of every later search for garbage, that at the end included."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.name != 'test_kernels_under_the_interpreter')
