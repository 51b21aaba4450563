"""Device, processes, precision and seeds of a run."""
import importlib
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed
from timm import utils
from timm.layers import set_fast_norm
from timm.utils.distributed import init_distributed_device_so

from cpool_vision.errors import ConfigError
from cpool_vision.reading import reason

from .distributed.rendezvous import rendezvous_url
from .settings.shared import DeviceSettings

_logger = logging.getLogger(__name__)
_DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Numeric precision of a run.

    Attributes:
        model_dtype: dtype of the weights, None for float32.
        amp_dtype: autocast dtype, None without mixed precision.
        device_type: 'cpu', 'cuda', ...
    """

    model_dtype: torch.dtype | None
    amp_dtype: torch.dtype | None
    device_type: str

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """Function that creates the context manager for forward passes."""
        if self.amp_dtype is None:
            return nullcontext
        return partial(torch.autocast, device_type=self.device_type, dtype=self.amp_dtype)

    def loss_scaler(self) -> torch.amp.GradScaler:
        """Creates a loss scaler, enabled for float16 autocast only; without it, float16 gradients would underflow."""
        return torch.amp.GradScaler(self.device_type, enabled=self.amp_dtype is torch.float16)


def resolve_precision(settings: DeviceSettings, device: torch.device) -> Precision:
    """Reads `--amp`, `--amp-dtype` and `--model-dtype`; warns if the CPU has to emulate half precision.

    Raises:
        ConfigError: A dtype is unknown, or autocast is combined with weights that are not float32.
    """
    for flag, value in (('--amp-dtype', settings.amp_dtype), ('--model-dtype', settings.model_dtype)):
        if value and value not in _DTYPES:
            raise ConfigError(f'{flag} {value!r} is unknown: choose {", ".join(_DTYPES)}')
    model_dtype = _DTYPES[settings.model_dtype] if settings.model_dtype else None
    if not settings.amp:
        _warn_of_emulation(model_dtype, device, '--model-dtype')
        return Precision(model_dtype, None, device.type)
    if model_dtype not in (None, torch.float32):
        raise ConfigError(f'--amp needs float32 weights, got --model-dtype {settings.model_dtype}: drop one of the two')
    amp_dtype = _DTYPES[settings.amp_dtype]
    if amp_dtype is torch.float32:
        raise ConfigError("--amp-dtype 'float32' is not mixed precision: choose float16 or bfloat16, or drop --amp")
    _warn_of_emulation(amp_dtype, device, '--amp')
    return Precision(model_dtype, amp_dtype, device.type)


def _warn_of_emulation(dtype: torch.dtype | None, device: torch.device, flag: str) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type == 'cpu' and dtype in (torch.float16, torch.bfloat16) and capability == 'AVX2':
        _logger.warning(
            'This CPU (%s) has no instructions for %s: matrix products can be more than ten times slower than in '
            'float32. Drop %s on this machine.', capability, str(dtype).removeprefix('torch.'), flag)


@dataclass(frozen=True)
class Runtime:
    """Device, precision and rank of this process.

    Attributes:
        device: Device of this process.
        precision: Autocast and dtype.
        rank: Rank of this process.
        world_size: Number of processes.
        local_rank: Rank of this process on its machine.
    """

    device: torch.device
    precision: Precision
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def distributed(self) -> bool:
        """Whether there are several processes."""
        return self.world_size > 1

    @property
    def primary(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0


def start_runtime(settings: DeviceSettings, join: bool = True) -> Runtime:
    """Imports `--device-modules`, joins the process group of torchrun or SLURM, and selects the device.

    `--deterministic` affects the whole process from then on.

    Args:
        settings: Device and precision.
        join: Whether to join a process group.

    Raises:
        ConfigError: A module or the device is not available, or the precision is invalid (see `resolve_precision`).
    """
    for module in settings.device_modules or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f'--device-modules {module!r} cannot be imported ({error}): install it, or drop the '
                              'flag') from error
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ConfigError(f'--device {settings.device!r} is unknown: use cpu, cuda or cuda:INDEX') from error
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(f'--device {settings.device!r}: no CUDA device is available; use --device cpu')
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f'--device {settings.device!r} cannot be used here ({reason(error, 120)}): use --device cpu') from error
    if settings.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    rank, world_size, local_rank = 0, 1, 0
    if join:
        joined = init_distributed_device_so(settings.device, dist_url=rendezvous_url())
        device = torch.device(joined['device'])
        rank, world_size, local_rank = (joined[name] for name in ('global_rank', 'world_size', 'local_rank'))
        if world_size > 1:
            _logger.info('Process %d of %d on %s.', rank, world_size, device)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if settings.fuser:
        utils.set_jit_fuser(settings.fuser)
    if settings.fast_norm:
        set_fast_norm()
    return Runtime(device, resolve_precision(settings, device), rank, world_size, local_rank)


def leave_processes() -> None:
    """Leaves the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def settle_threads(distributed: bool) -> None:
    """Waits 20 ms in distributed runs, so that data loading workers can be forked after a collective operation.

    When gloo's threads finish an operation, they briefly hold a lock of the interpreter. A child forked at that instant
    waits for the lock forever (CPython up to 3.11; up to 6 of 1000 forks after an all-reduce, see
    test_engine_kill.py).
    """
    if distributed:
        time.sleep(0.02)


def seed_everything(*keys: int) -> None:
    """Seeds `random`, numpy and torch from non-negative integers, such as (seed, rank, epoch).

    Similar keys give unrelated streams. Training calls it before each batch, so that a resumed run draws the same
    numbers.
    """
    seed = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)  # noqa: NPY002 - timm's Mixup and transforms draw from numpy's global generator
    torch.manual_seed(seed)
