"""The kernels compile ahead of time for sm_80 and sm_90, without a GPU, and spill few registers as shipped."""
import os
import re

import pytest
import torch

triton = pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels are not compiled', allow_module_level=True)

from benchmarks.kernel_cost.cost import by_pair  # noqa: E402
from benchmarks.kernel_cost.launches import Call, compile_call, compile_only  # noqa: E402
from benchmarks.kernel_cost.sass import BIN, disassemble  # noqa: E402
from benchmarks.kernel_cost.windows import Windows  # noqa: E402
from cpool_vision.ops.maps import empty_pair  # noqa: E402
from cpool_vision.ops.triton import launch  # noqa: E402
from cpool_vision.ops.triton.predictor import fill_predicted, predicted_gradients  # noqa: E402

# Of a thread block, without opting in to more.
SHARED_LIMIT = 48 * 1024
# Bytes of a thread that may be spilled: where registers are capped, which a device showed to be faster, and elsewhere.
SPILLED_LIMIT = {True: 512, False: 32}
KERNELS = ('prepare', 'pool', 'grad_queries', 'grad_keys')
needs_tools = pytest.mark.skipif(not (BIN / 'cuobjdump').is_file(), reason='this build of Triton has no cuobjdump')
slow = pytest.mark.slow

# Channels of a group and the map: one for each shipped configuration.
SHAPES = [
    (48, 14), (12, 28), (96, 56),
    *(pytest.param(*shape, marks=slow) for shape in (
        (24, 14), (48, 7), (48, 24), (24, 28), (64, 14), (768, 14), (128, 56), (16, 112), (256, 24), (96, 14)))]

# Most instructions by (query, key) pair of `pool`, `grad_queries` and `grad_keys` on sm_90, a twentieth above those
# that Triton 3.8 makes: `python -m benchmarks.kernel_cost`.
BOUNDS = {
    Call(128, 768, 14, 14, 16, 3.5): (5.3, 10.9, 11.9),
    Call(128, 192, 28, 28, 16, 2.8): (5.6, 10.8, 9.5),
    Call(64, 96, 56, 56, 1, 2.0): (10.1, 16.5, 15.8),
    Call(128, 768, 14, 14, 1, 3.5): (6.8, 38.2, 13.5),
}


def spills(compiled_launch):
    machine = disassemble(compiled_launch.compiled.asm['cubin'])
    assert 0 < machine.registers <= 255
    return machine.stack


@needs_tools
@pytest.mark.parametrize('channels,side', SHAPES)
@pytest.mark.parametrize('dtype,tokens,arch', [
    (torch.bfloat16, True, 90), (torch.float32, False, 80),
    *(pytest.param(*case, marks=slow) for case in (
        (torch.bfloat16, True, 80), (torch.bfloat16, False, 90), (torch.float16, True, 90), (torch.float32, True, 90),
        (torch.float32, False, 90), (torch.float16, False, 80)))], ids=str)
def test_shipped_configurations_spill_little(channels, side, dtype, tokens, arch):
    for each in compile_call(Call(2, 2 * channels, side, side, 2, 2.0, dtype, tokens), arch):
        assert spills(each) <= SPILLED_LIMIT[bool(each.compiled.metadata.maxnreg)], each.name
        assert each.compiled.metadata.shared <= SHARED_LIMIT, each.name


# Hidden channels, rows of output, and the dtype.
PREDICTORS = [(24, 32, torch.bfloat16), (24, 32, torch.float32), *(pytest.param(*case, marks=slow) for case in (
    (16, 16, torch.bfloat16), (48, 32, torch.float16), (128, 64, torch.bfloat16), (128, 64, torch.float32)))]


@needs_tools
@pytest.mark.parametrize('hidden,rows,dtype', PREDICTORS)
@pytest.mark.parametrize('arch', [90, pytest.param(80, marks=slow)])
def test_kernels_of_the_predictor_spill_nothing(hidden, rows, dtype, arch):
    tokens = torch.empty(4, 197, hidden, dtype=dtype, device='meta')
    weights = [torch.empty(shape, device='meta') for shape in ((hidden,), (rows, hidden, 3, 3), (rows,))]
    maps = empty_pair(tokens, 4, 14, 14, rows // 2, rows // 2, 1)
    launches = []
    with compile_only(arch, launches):
        fill_predicted(tokens, *weights, *maps, 1, 8., 3.5, .1)
        predicted_gradients(*maps, *maps, tokens, *weights, 1, 8., 3.5, .1)
    assert [each.name for each in launches] == ['predict', 'unmake', 'unpredict', 'finish']
    for each in launches:
        assert spills(each) == 0, each.name
        assert each.compiled.metadata.shared <= 2 * SHARED_LIMIT, each.name


def instructions(call):
    """By pair, of each kernel that makes pairs."""
    windows = Windows(call)
    return tuple(by_pair(each, windows.trips(each))[0] for each in compile_call(call)[1:])


@needs_tools
@pytest.mark.skipif(not triton.__version__.startswith('3.8.'), reason='the bounds are of code that Triton 3.8 makes')
@pytest.mark.parametrize('call', list(BOUNDS), ids=str)
def test_instructions_by_pair_stay_below_their_bounds(call):
    assert all(0 < n <= bound for n, bound in zip(instructions(call), BOUNDS[call], strict=True)), instructions(call)


@needs_tools
@pytest.mark.skipif(not triton.__version__.startswith('3.8.'), reason='the bounds are of code that Triton 3.8 makes')
def test_a_slower_configuration_exceeds_the_bounds(monkeypatch):
    """Negative control: tiles of half as many queries share less."""
    monkeypatch.setattr(launch, 'choose_config', lambda *_: launch.Config(4, 16, 1, 64, 0))
    call = next(iter(BOUNDS))
    assert all(n > bound for n, bound in zip(instructions(call), BOUNDS[call], strict=True))


@pytest.mark.parametrize('call', [
    Call(2, 4, 1, 1, 2, 1.0, torch.float32), Call(1, 4, 1, 9, 1, 1.0, torch.float32, False),
    Call(2, 6, 33, 1, 3, 1.0, torch.float32, True, 2), Call(2, 16, 20, 17, 1, 1.0, torch.bfloat16, False, 3)], ids=str)
def test_odd_sizes_compile(call):
    launches = compile_call(call, 80)
    assert tuple(each.name for each in launches) == KERNELS
    assert all(each.compiled.asm['cubin'] for each in launches)


def test_offsets_beyond_32_bits_compile(monkeypatch):
    monkeypatch.setattr(launch, 'needs_wide_index', lambda *_: True)
    assert all(each.compiled.asm['cubin'] for each in compile_call(Call(2, 64, 18, 18, 1, 1.0)))


@needs_tools
def test_spills_would_be_seen(monkeypatch):
    """Negative control: one warp cannot hold these blocks."""
    monkeypatch.setattr(launch, 'choose_config', lambda *_: launch.Config(4, 16, 2, 128, 0, 1))
    assert max(map(spills, compile_call(Call(2, 128, 16, 16, 1, 1.0)))) > max(SPILLED_LIMIT.values())


@pytest.mark.parametrize('arch', [80, 90])
def test_products_and_sums(arch):
    """fp32 by three products of TF32, together as exact; half precision as it is; nothing is added atomically."""
    exact, half = (
        {each.name: each.compiled.asm['ptx'] for each in compile_call(Call(2, 64, 16, 16, 1, 1.0, dtype), arch)}
        for dtype in (torch.float32, torch.bfloat16))
    for name in KERNELS[1:]:
        assert len(re.findall(r'mma\S*tf32', exact[name])) >= 3, name
        assert re.search(r'mma\S*bf16', half[name]) and 'tf32' not in half[name], name
        assert not re.search(r'\batom\.|\bred\.', exact[name] + half[name]), name
