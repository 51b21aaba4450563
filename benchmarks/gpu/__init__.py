"""One command that measures the operator and the variants on a CUDA machine: see `benchmarks.gpu.__main__`."""
