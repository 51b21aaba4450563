"""Launches of one form reuse what Triton compiled for the first; tensors stand in for those of a device."""
import pytest
import torch

pytest.importorskip('triton')

from cpool_vision.ops.triton.launch import Form, Launch


class Kernel:
    """Notes which way it was launched, with which arguments."""
    arg_names = ('p_x', 'p_y', 'size', 'BLOCK', 'TILE')

    def __init__(self):
        self.sorted, self.direct = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.sorted.append((grid, args, constants))
            return self
        return run if len(grid) == 1 else lambda *args: self.direct.append((grid, args))


class OnDevice:
    is_cuda = True

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


@pytest.fixture
def launched():
    kernel = Kernel()
    # Constants in another order than the kernel's, and a launch option that is no argument.
    return kernel, Launch(kernel, 7, (5,), {'TILE': 2, 'num_warps': 4, 'BLOCK': 16})


def test_the_second_launch_goes_directly_with_the_same_arguments(launched):
    kernel, launch = launched
    x, y, z = OnDevice(32), OnDevice(64), OnDevice(96)
    launch(x, y)
    assert kernel.sorted == [((7,), (x, y, 5), {'TILE': 2, 'num_warps': 4, 'BLOCK': 16})]
    launch(x, z)
    assert kernel.direct == [((7, 1, 1), (x, z, 5, 16, 2))] and len(kernel.sorted) == 1


def test_an_address_that_is_not_aligned_never_goes_directly(launched):
    kernel, launch = launched
    for address in (8, 32, 8):
        launch(OnDevice(address), OnDevice(64))
    assert len(kernel.sorted) == 3 and not kernel.direct


def test_tensors_of_the_cpu_are_interpreted_each_time(launched):
    kernel, launch = launched
    for _ in range(2):
        launch(torch.empty(4), torch.empty(4))
    assert len(kernel.sorted) == 2 and not kernel.direct


def test_forms_tell_apart_whatever_a_kernel_is_compiled_for():
    x, maps = torch.empty(2, 8, 5, 6), torch.empty(2, 2, 5, 6)

    def form(x=x, logits=maps, sigma=maps, stride=1, y=x):
        return Form.of(stride, x, logits, sigma, y)

    assert form() == form(y=torch.empty_like(x))
    others = [
        form(x=x.bfloat16()), form(x=x.to(memory_format=torch.channels_last)), form(logits=maps.double()),
        form(logits=maps[:, :1]), form(sigma=maps[:, :1]), form(sigma=maps.bfloat16()), form(stride=2),
        form(y=x.to(memory_format=torch.channels_last)), form(x=x.to('meta')), form(x=x[:1])]
    assert len({form(), *others}) == 1 + len(others)
