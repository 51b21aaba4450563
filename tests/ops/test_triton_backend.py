"""When the Triton backend is chosen and refused, and its kernels' tests under Triton's interpreter."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_testing import make_case

from cpool_vision.ops import available_backends, backends, context_pool2d

HERE = Path(__file__).parent
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def _python(*args, **env):
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | env
    return subprocess.run(  # noqa: S603
        [sys.executable, *args], capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)


@pytest.mark.skipif(INTERPRETED, reason='this process interprets already')
def test_kernels_under_the_interpreter():
    pytest.importorskip('triton')
    command = ('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'not needs_cuda',
               *map(str, HERE.glob('test_triton_[kmp]*.py')))
    out = _python(*command, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')
    assert out.returncode == 0, out.stdout + out.stderr
    summary = out.stdout.splitlines()[-1]
    assert int(re.search(r'(\d+) passed', summary)[1]) > 40 and 'skipped' not in summary


@pytest.mark.skipif(INTERPRETED, reason='is about a process that does not interpret')
def test_cpu_tensors_are_refused_with_the_remedy():
    case = make_case(1, 4, 6, 5)[:3]
    assert 'TRITON_INTERPRET=1' in available_backends(*case)['triton'] or not backends._has_triton()
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run: .*pass backend=None"):
        context_pool2d(*case, backend='triton')


def test_other_reasons(monkeypatch):
    x, logits, sigma, _ = make_case(1, 4, 6, 5)
    assert 'float64' in available_backends(x.double(), logits, sigma)['triton']
    seen = []
    torch.func.vmap(lambda t: seen.append(available_backends(t, logits, sigma)['triton']) or t)(x[None])
    assert 'torch.func' in seen[0]
    monkeypatch.setattr(backends, '_has_triton', lambda: False)
    assert available_backends(x, logits, sigma)['triton'] == 'triton is not installed'


START = ('import os, sys, torch; from cpool_vision.ops import context_pool2d as p; x = torch.randn(1, 4, 8, 8); '
         's = torch.ones(1, 1, 8, 8); ')
IMPORTED = 'p(x, s, s); print(sys.modules.get("cpool_vision.ops.triton.launch")); '


def test_the_first_call_may_be_compiled_and_triton_is_never_imported_by_default_on_a_cpu():
    compiled = 'print(tuple(torch.compile(p, fullgraph=True, backend="aot_eager")(x, s, s).shape)); '
    out = _python('-c', START + compiled + IMPORTED, TRITON_INTERPRET='1')
    assert out.stdout.splitlines() == ['(1, 4, 8, 8)', 'None'], out.stderr


def test_variable_set_too_late_is_said():
    """In a process that does not interpret either, nothing is imported before."""
    pytest.importorskip('triton')
    out = _python('-c', START + IMPORTED + (
        'import triton; os.environ["TRITON_INTERPRET"] = "1"; from cpool_vision.ops import available_backends; '
        'print(available_backends(s, s, s)["triton"])'))
    assert out.stdout.split('\n')[:2] == [
        'None', 'triton was imported before TRITON_INTERPRET=1 was set'], out.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_is_the_default_on_cuda():
    x, logits, sigma = (t.cuda() for t in make_case(1, 4, 6, 5)[:3])
    assert backends.choose_backend(x, logits, sigma, 1, None) == 'triton'
