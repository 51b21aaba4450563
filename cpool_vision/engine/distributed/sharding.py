"""`--fsdp`: shards parameters, gradients, averaged weights and optimizer state across the processes (FSDP2).

Checkpoints contain whole tensors, gathered one at a time and written by the first process. Any number of processes can
load them, with or without `--fsdp`.
"""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed
import torch.nn as nn
from timm.task import TrainingTask
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import StateDict

from cpool_vision.errors import ConfigError

from ..settings.train import EmaSettings, TrainSettings

# optimizers whose state tensors have the shape of the parameter, so that they can be sharded like it
_OPTIMIZERS = ('adam', 'adamw', 'momentum', 'sgd')
_STREAMED = ('hfids', 'tfds', 'wds')


def trained_module(task: TrainingTask) -> nn.Module:
    """Returns the module that a task trains, with its DDP or FSDP wrapper."""
    module = task.get_trainable_module()
    return task if module is None else module


def validated_model(task: TrainingTask, ema: bool = False) -> nn.Module:
    """Returns the model that a task validates: the trained one or, with `ema`, its average, which must exist."""
    model = task.get_eval_model(ema=ema)
    return trained_module(task) if model is None else model


def check_fsdp(settings: TrainSettings, distributed: bool) -> None:
    """Checks that `--fsdp` works with the other settings.

    Args:
        settings: Settings of the run.
        distributed: Whether there are several processes.

    Raises:
        ConfigError: If it does not.
    """
    if not settings.fsdp:
        return
    if not distributed:
        raise ConfigError('--fsdp shards the model across several processes: start them with torchrun, or drop --fsdp')
    clashes = {
        '--torchcompile': settings.torchcompile, '--torchscript': settings.torchscript,
        '--naflex-loader': settings.naflex_loader,
        '--kd-model-name': settings.kd_model_name, '--model-ema-force-cpu': settings.model_ema_force_cpu,
        '--sync-bn': settings.sync_bn, '--amp-dtype float16': settings.amp and settings.amp_dtype == 'float16',
        '--clip-mode agc': settings.clip_grad is not None and settings.clip_mode == 'agc',
        f'--dataset {settings.dataset}': settings.dataset.partition('/')[0].lower() in _STREAMED,
    }
    for flag, given in clashes.items():
        if given:
            raise ConfigError(f'--fsdp does not work with {flag}: drop one of them')
    if settings.opt.lower() not in _OPTIMIZERS:
        raise ConfigError(f'--fsdp cannot shard the state of --opt {settings.opt}: choose {", ".join(_OPTIMIZERS)}')


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost blocks of a model, whose classes timm names ...Block or ...Bottleneck."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__.endswith(('Block', 'Bottleneck')) and next(child.parameters(), None) is not None:
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def shard_task(task: TrainingTask, settings: EmaSettings, device: torch.device) -> None:
    """Sets up the average of the weights and shards it and the model, block by block. Precedes the optimizer."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    models = [trained_module(task)]
    if settings.model_ema:
        average = task.setup_ema(decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup,
                                 foreach=False)  # a list of tensors would mix sharded parameters and whole buffers
        models += average.children()
    for model in models:
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # allocate the whole parameters now: created by a validation under inference_mode, they could not train
                module.unshard()
                module.reshard()


@contextmanager
def no_exchange(task: TrainingTask) -> Iterator[None]:
    """Accumulates gradients in each process without reducing them over processes, under DDP or FSDP."""
    module = trained_module(task)
    if not isinstance(module, FSDPModule):
        with task.no_sync():
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_whole(value: object, keep: bool) -> object:
    """Gathers the sharded tensors in nested dictionaries and lists onto the CPU; every process must call it.

    Args:
        value: Dictionaries, lists and leaves.
        keep: Whether this process needs the result. Otherwise sharded tensors become None.

    Returns:
        The same structure with whole tensors.
    """
    if isinstance(value, Mapping):
        return {key: gather_whole(item, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [gather_whole(item, keep) for item in value]
    if isinstance(value, DTensor):
        whole = value.full_tensor().detach()
        return whole.cpu() if keep else None
    return value


def divide_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shards a whole tensor, which all processes have, in the same way as `like`. A no-op if `like` is not sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def divide_optimizer_state(optimizer: torch.optim.Optimizer, content: StateDict) -> StateDict:
    """Shards the state of an optimizer in the same way as its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    order = [index for group in content['param_groups'] for index in group['params']]
    state = dict(content['state'])
    for index, parameter in zip(order, parameters, strict=False):
        if index in state:
            state[index] = {
                key: divide_like(value, parameter) if isinstance(value, torch.Tensor) else value
                for key, value in state[index].items()}
    return {**content, 'state': state}
