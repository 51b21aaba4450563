"""The kernels compile ahead of time for sm_80 and sm_90, without a GPU, and spill no registers as shipped."""
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels are not compiled', allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cpool_vision.ops.triton import backward, forward, launch  # noqa: E402
from cpool_vision.ops.triton.common import SEARCH  # noqa: E402

KERNELS = (forward.pool_forward, backward.grad_supports, backward.grad_logits, backward.grad_features)
TYPES = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16'}
CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
# Of a thread block, without opting in to more.
SHARED_LIMIT = 48 * 1024
FEATURES = ('p_x', 'p_y', 'p_dx', 'p_grad')


def compile_kernel(kernel, channels, dtype, channels_last, arch, config=None, ones=(), batch_stride='i32'):
    """The compiled kernel as a call on maps of so many channels, in one of the two plain layouts, makes it.

    A launch takes integers that equal 1 for constants: those named in `ones`. `batch_stride` is a type.
    """
    config = config or launch.choose_config(kernel, channels, dtype, channels_last)
    constants = launch.tile_constants() | {
        'BLOCK_C': config.block_c, 'SEARCH': SEARCH, 'SHIFT': launch.SHIFT[dtype]}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    unit = 'c' if channels_last else 'w'
    constants |= {name: 1 for name in kernel.arg_names if re.fullmatch(f's_[xyg]{unit}', name)}
    constants |= {name: 1 for name in kernel.arg_names if name in ones}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name.startswith('p_'):
            signature[name] = '*' + (TYPES[dtype] if name in FEATURES else 'i32' if name == 'p_reach' else 'fp32')
        else:
            plain = 'fp32' if name == 'log_tolerance' else 'i32'
            signature[name] = batch_stride if re.fullmatch('s_.b', name) else plain
        aligned = channels_last and re.fullmatch('s_[xyg][bhw]|channels', name)
        if name not in constants and (aligned or name.startswith('p_')):
            attributes[(i,)] = [['tt.divisibility', 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget('cuda', arch, 32),
        options={'num_warps': config.num_warps, 'num_stages': config.num_stages})


def usage(compiled, path):
    """Registers of a thread and bytes of its stack, which holds what was spilled, as the assembled binary says."""
    file = path / 'kernel.cubin'
    file.write_bytes(compiled.asm['cubin'])
    out = subprocess.run(  # noqa: S603
        [str(CUOBJDUMP), '-res-usage', str(file)], capture_output=True, text=True, check=True)
    found = re.search(r'REG:(\d+) STACK:(\d+)', out.stdout + out.stderr)
    return int(found[1]), int(found[2])


needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.is_file(), reason='this build of Triton has no cuobjdump')


@needs_cuobjdump
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize('channels', [16, pytest.param(32, marks=pytest.mark.slow), pytest.param(
    64, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), 256])
@pytest.mark.parametrize('arch', [80, 90])
def test_shipped_configurations_spill_nothing(arch, channels, dtype, channels_last, tmp_path):
    for kernel in KERNELS:
        compiled = compile_kernel(kernel, channels, dtype, channels_last, arch)
        registers, stack = usage(compiled, tmp_path)
        assert 0 < registers <= 255 and stack == 0, f'{kernel.__name__}: {registers=}, {stack=}'
        assert 0 < compiled.metadata.shared <= SHARED_LIMIT, kernel.__name__


@pytest.mark.parametrize('ones', [
    ('stride', 'groups'),
    ('stride', 'groups', 'height', 'width', 'out_height', 'out_width', 'channels'),
    ('height', 'out_height', 's_lg', 's_sg', 's_lw', 's_sw'),
], ids=['plain', 'one_pixel', 'one_row'])
def test_sizes_of_one_compile(ones):
    for kernel in KERNELS:
        assert compile_kernel(kernel, 16, torch.float32, False, 80, ones=ones).asm['cubin']


def test_batch_strides_beyond_32_bits_compile():
    for kernel in KERNELS:
        assert compile_kernel(kernel, 64, torch.bfloat16, True, 90, batch_stride='i64').asm['cubin']


@needs_cuobjdump
def test_spills_would_be_seen(tmp_path):
    """Negative control: one warp cannot hold these blocks."""
    config = launch.Config(64, 1, 2)
    compiled = compile_kernel(forward.pool_forward, 128, torch.float32, False, 80, config)
    assert usage(compiled, tmp_path)[1] > 0


@pytest.mark.parametrize('arch', [80, 90])
def test_products_of_fp32_do_not_use_tf32(arch):
    for kernel in KERNELS:
        ptx = compile_kernel(kernel, 64, torch.float32, True, arch).asm['ptx']
        assert 'tf32' not in ptx
    half = compile_kernel(forward.pool_forward, 64, torch.bfloat16, True, arch).asm['ptx']
    assert re.search(r'mma\S*bf16', half)
    assert not re.search(r'\batom\.|\bred\.', half)
