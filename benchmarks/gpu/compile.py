"""Kernels compiled ahead, in processes of their own, into Triton's cache."""
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.kernel_cost.launches import Call, compile_call
from cpool_vision.profile.cases import Case

Job = tuple[Case, str | None, Any]


def arch_of(device: str) -> int:
    """90 for an H100 or H200."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compile_kernels(jobs: Iterable[Case | Job], arch: int) -> Executor:
    """Starts to compile what the operator launches for these cases, as shipped or with a kernel configured otherwise:
    a case, the kernel's name, and its `Config`."""
    workers = ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context('spawn'))
    for job in jobs:
        case, kernel, config = job if isinstance(job, tuple) else (job, None, None)
        workers.submit(compile_case, case, kernel, config, arch)
    return workers


def compile_case(case: Case, kernel: str | None, config: Any, arch: int) -> int:
    """Compiles the kernels of a case; returns how many."""
    call = Call(*case.shape, case.groups, case.sigma[1], case.torch_dtype, case.channels_last, case.stride)
    if kernel is None:
        return len(compile_call(call, arch))
    from .configs import configured
    with configured(kernel, config):
        return len(compile_call(call, arch))
