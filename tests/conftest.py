"""What holds for every test."""
import os

if 'PYTEST_XDIST_WORKER' in os.environ:  # before anything imports NumPy or PyTorch; subprocesses inherit it
    os.environ.setdefault('OMP_NUM_THREADS', '1')
