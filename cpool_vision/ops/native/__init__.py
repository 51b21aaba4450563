"""Kernels in C for the processor. They are compiled when first used; `build.why_not` says where they cannot be had."""
from .build import why_not
from .launch import native_backward, native_forward

__all__ = ['native_backward', 'native_forward', 'why_not']
