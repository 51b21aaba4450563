"""Kernels in C for the processor. They are compiled at the first call.

`why_not` says where they cannot be had, without compiling; `prepare` compiles.
"""
from .build import prepare, why_not
from .launch import native_backward, native_forward

__all__ = ['native_backward', 'native_forward', 'prepare', 'why_not']
