"""Supports of a model on the first batch of a validation, without another pass over data and without a trace."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from cpool_vision.inspect import SupportStatistics, context_maps, support_statistics

from ..device import Precision

_IMAGES = 64


@contextmanager
def keep_first_input(model: Any) -> Iterator[list[torch.Tensor]]:
    """Puts up to 64 images of the first batch that the model gets into the list that it yields; none if scripted."""
    kept: list[torch.Tensor] = []
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        yield kept
        return

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not kept and inputs and isinstance(inputs[0], torch.Tensor):
            kept.append(inputs[0][:_IMAGES].clone())

    handle = model.register_forward_pre_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


@torch.inference_mode()
def measure_supports(model: nn.Module, images: torch.Tensor, precision: Precision) -> list[SupportStatistics]:
    """Statistics of the supports of each context pool; none for a model without.

    Random numbers, statistics of batch norm and the mode of each module stay as they are.

    Args:
        model: as it is validated; wrappers are taken off.
        images: `(B, C, H, W)`, normalised, on the device of the model.
        precision: as in validation.
    """
    with precision.autocast():
        try:
            maps = context_maps(unwrap_model(model), images)
        except ValueError:  # it has no context pool
            return []
    return support_statistics(maps, (images.shape[-2], images.shape[-1]))
