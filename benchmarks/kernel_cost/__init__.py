"""Static cost of the operator's Triton kernels on NVIDIA GPUs, on a machine without one."""
