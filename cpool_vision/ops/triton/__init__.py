"""Fused Triton kernels of the operator. Only `launch` needs Triton; `cpool_vision.ops` imports it on first use."""
