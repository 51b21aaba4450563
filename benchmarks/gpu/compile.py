"""Kernels compiled ahead, in processes of their own, into Triton's cache."""
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor

from benchmarks.kernel_cost.launches import Call, compile_call
from cpool_vision.profile.cases import Case


def compile_kernels(cases: Iterable[Case], arch: int) -> Executor:
    """Starts to compile what the operator launches for these cases; `arch` is 90 for an H100 or H200."""
    workers = ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context('spawn'))
    for case in cases:
        workers.submit(_compile, case, arch)
    return workers


def _compile(case: Case, arch: int) -> int:
    return len(compile_call(
        Call(*case.shape, case.groups, case.sigma[1], case.torch_dtype, case.channels_last, case.stride), arch))
