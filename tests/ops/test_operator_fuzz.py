"""Random calls of the kernels in C against the fp64 definition; under the compiler's sanitizers with `-m slow`.

`CPOOL_FUZZ_CASES` sets how many: each is reproducible by its index.
"""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_testing import NO_COMPILER, assert_close_to_definition, context_pool2d_reference, make_case

from cpool_vision.ops import context_pool2d
from cpool_vision.ops.native import build, native_backward, native_forward

CASES = int(os.environ.get('CPOOL_FUZZ_CASES', '200'))
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(NO_COMPILER, reason='no C compiler')


def _in_some_layout(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    layout = rng.choice(('contiguous', 'channels_last', 'tokens', 'strided', 'expanded'))
    if layout == 'channels_last':
        return t.to(memory_format=torch.channels_last)
    if layout == 'tokens':
        held = t.new_full((t.shape[0], t.shape[2] * t.shape[3] + 3, t.shape[1]), float('nan'))
        held[:, 2:-1] = t.flatten(2).transpose(1, 2)
        return held[:, 2:-1].transpose(1, 2).unflatten(2, t.shape[2:])
    if layout == 'strided':
        return torch.stack((t, torch.full_like(t, float('nan'))), -1)[..., 0]
    if layout == 'expanded' and t.shape[0] > 1:
        return t[:1].expand_as(t)
    return t


def _fuzz(index: int) -> None:
    rng = random.Random(index)  # noqa: S311
    shared = rng.choice((1, 1, 2, 3))
    groups = shared * rng.choice((1, 1, 2, 4))
    stride = rng.choice((1, 1, 1, 2, 3, 9, 40))
    largest = rng.choice((1e-30, 1e-3, 0.4, 1.0, 3.0, 30.0, 1e6))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    x, logits, sigma, grad = make_case(
        rng.randint(1, 3), groups * rng.choice((1, 2, 3, 5, 8, 16, 17, 24, 33)),
        rng.randint(1, 20), rng.randint(1, 20), groups, stride, (largest / 10, largest),
        rng.choice((0.0, 1.0, 4.0, 9.0, 40.0)), dtype, seed=index)
    sigma = sigma[:, ::groups // shared].contiguous()
    if rng.random() < 0.2 and x.shape[3] > 3 and stride == 1:
        logits[..., :2] = -float('inf')
    torch.set_num_threads(rng.choice((1, 1, 2, 3)))

    def kernels(x, logits, sigma):
        return context_pool2d(
            _in_some_layout(random.Random(index), x), logits, sigma,  # noqa: S311
            stride=stride, backend='native')

    def definition(x, logits, sigma):
        each = sigma.repeat_interleave(groups // shared, 1)
        return context_pool2d_reference(_in_some_layout(random.Random(index), x), logits, each, stride)  # noqa: S311

    case = (x, logits, sigma, grad)
    # eager sums few outputs in halves, the kernels as the keys come
    assert_close_to_definition(kernels, definition, case, stride, 2 * torch.finfo(torch.float32).eps)
    x, grad = _in_some_layout(rng, x), _in_some_layout(rng, grad)
    results = (torch.empty_like(grad, dtype=rng.choice((torch.float32, dtype))),
               torch.empty_like(x, dtype=rng.choice((torch.float32, dtype))))
    out, dx = (_in_some_layout(rng, t) if t.shape[0] == 1 else t for t in results)
    native_forward(x, logits, sigma, stride, out)
    expected = native_backward(grad, x, logits, sigma, stride)
    got = native_backward(grad, x, logits, sigma, stride, dx)
    torch.testing.assert_close(out.to(dtype), native_forward(x, logits, sigma, stride))
    torch.testing.assert_close(dx.to(dtype), expected[0])
    for mine, other in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize('first', range(0, CASES, 50))
def test_random_calls(first):
    threads = torch.get_num_threads()
    try:
        for index in range(first, min(first + 50, CASES)):
            try:
                _fuzz(index)
            except AssertionError as error:
                raise AssertionError(f'case {index}: {error}') from error
    finally:
        torch.set_num_threads(threads)


# What the subprocess runs. The compiler itself goes without the runtime.
SANITIZED = """
import os, sys
del os.environ['LD_PRELOAD']
import pytest
from cpool_vision.ops.native import build
build.FLAGS = ('-O2', '-g1', '-fsanitize=address,undefined', '-fno-sanitize-recover=undefined', *build.FLAGS[1:])
build.TIMEOUT_S = 1200
reason = build.prepare()
sys.exit(reason or pytest.main(sys.argv[1:]))
"""


def _runtimes(compiler: list[str]) -> list[str]:
    """The sanitizer's runtime, and that of C++ whose exceptions it intercepts; both must come first in a process."""
    found = [subprocess.run(  # noqa: S603
        [*compiler, f'-print-file-name={name}'], capture_output=True, text=True, check=True).stdout.strip()
        for name in ('libasan.so', 'libstdc++.so')]
    return [str(Path(path).resolve()) for path in found if os.path.isabs(path)]


@pytest.mark.slow
def test_kernels_are_clean_under_address_and_undefined_behavior_sanitizers(tmp_path):
    runtimes = _runtimes(build._compiler())
    if len(runtimes) < 2:
        pytest.skip('the compiler has no address sanitizer')
    env = dict(
        os.environ, LD_PRELOAD=' '.join(runtimes), CPOOL_VISION_CACHE=str(tmp_path / 'cache'), CPOOL_FUZZ_CASES='2000',
        ASAN_OPTIONS='detect_leaks=0:allocator_may_return_null=1', UBSAN_OPTIONS='print_stacktrace=1')
    tests = ('fuzz', 'values', 'checks', 'offset', 'tokens')
    done = subprocess.run(  # noqa: S603
        [sys.executable, '-c', SANITIZED, '-q', '-x', '-p', 'no:cacheprovider', '-k', 'native or random_calls',
         *(str(HERE / f'test_operator_{name}.py') for name in tests)],
        capture_output=True, text=True, env=env, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    made, = (tmp_path / 'cache').glob('kernels-*.so')
    assert b'__asan_report' in made.read_bytes(), 'the kernels were built without the sanitizer'
