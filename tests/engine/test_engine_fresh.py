"""Runs a module that forks trainings in a process that has started no threads."""
import os
import re
import subprocess
import sys
from pathlib import Path

MODULE = Path(__file__).with_name('test_engine_sharded.py')


def test_divided_checkpoints_in_a_process_of_their_own() -> None:
    out = subprocess.run(  # noqa: S603
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow', str(MODULE)],
        capture_output=True, text=True, cwd=MODULE.parents[2],
        env=dict(os.environ, CPOOL_FRESH_PROCESS='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert out.returncode == 0, out.stdout + out.stderr
    summary = out.stdout.splitlines()[-1]
    found = re.search(r'(\d+) passed', summary)
    assert found is not None and int(found[1]) > 12 and 'skipped' not in summary
