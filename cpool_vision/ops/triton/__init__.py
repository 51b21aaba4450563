"""Fused Triton kernels of the operator. Importing this needs Triton; `cpool_vision.ops` does so on first use only."""
from .launch import triton_backward, triton_forward

__all__ = ['triton_backward', 'triton_forward']
