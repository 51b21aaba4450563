"""The examples run as they stand, on less work."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'
CASES = {
    'plain_cnn.py': (['--images', '128', '--epochs', '1'], 'of the supports lie between'),
    'segmentation_unet.py': (['--steps', '2'], 'intersection over union on new images'),
    'finetune_folder.py': (['--epochs', '1', '--size', '32'], 'epoch 0: loss'),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob('*.py')} == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(CASES))
def test_example_runs(name):
    arguments, words = CASES[name]
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=600, check=False,
        env=dict(os.environ, PYTHONPATH=str(EXAMPLES.parent)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
