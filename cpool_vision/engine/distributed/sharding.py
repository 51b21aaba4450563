"""`--fsdp`: parameters, gradients, averaged weights and optimizer state sharded across the processes (FSDP2).

Checkpoints stay what they are without: whole tensors, gathered one by one and written by the first process. Any number
of processes, with or without `--fsdp`, loads them.
"""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
from timm.task import TrainingTask
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cpool_vision.errors import ConfigError

from ..settings.train import EmaSettings, TrainSettings

# of these each entry of the state belongs to one entry of a parameter, so that they can be divided alike
_OPTIMIZERS = ('adam', 'adamw', 'momentum', 'sgd')
_STREAMED = ('hfids', 'tfds', 'wds')


def check_fsdp(settings: TrainSettings, distributed: bool) -> None:
    """Raises `ConfigError` for what `--fsdp` cannot do; to be called once the processes have met."""
    if not settings.fsdp:
        return
    if not distributed:
        raise ConfigError('--fsdp divides the model among several processes: start them by torchrun, or drop it')
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
        raise ConfigError(f'--fsdp does not divide the state of --opt {settings.opt}: choose {", ".join(_OPTIMIZERS)}')


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, outermost first found; timm names their classes ...Block and Bottleneck."""
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
    """Divides the model, block by block, and its average, which is set up here; before the optimizer is built."""
    if settings.model_ema:
        average: Any = task.setup_ema(decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup)
        average.foreach = False  # its lists would mix divided parameters and whole buffers
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    models: list[Any] = [task.get_trainable_module()]
    if settings.model_ema:
        models.append(average.module)
    for model in models:
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # whole parameters that come into being under inference_mode, in validation, could not be trained
                module.unshard()
                module.reshard()


@contextmanager
def no_exchange(task: TrainingTask) -> Iterator[None]:
    """Within it backward passes add to the gradients of this process alone, under DDP or FSDP."""
    module: Any = task.get_trainable_module()
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
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_whole(value: Any, keep: bool) -> Any:
    """Nested values with each divided tensor made whole, on the CPU; every process must call it.

    Args:
        value: dictionaries, lists and leaves.
        keep: whether this process wants the result; the others get None for each tensor that was divided.
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
    """This process's part of a whole tensor that all processes have, divided as `like` is; itself if that is not."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def divide_optimizer_state(optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state of an optimizer, divided as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    order = [index for group in content['param_groups'] for index in group['params']]
    state = dict(content['state'])
    for index, parameter in zip(order, parameters, strict=False):
        if index in state:
            state[index] = {
                key: divide_like(value, parameter) if isinstance(value, torch.Tensor) else value
                for key, value in state[index].items()}
    return {**content, 'state': state}
