"""What holds for every test."""
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test waits for the hub of weights
if 'PYTEST_XDIST_WORKER' in os.environ:  # before anything imports NumPy or PyTorch; subprocesses inherit it
    os.environ.setdefault('OMP_NUM_THREADS', '1')
