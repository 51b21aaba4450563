"""Supports of a model on the first batch of a validation, without another pass over data and without a trace."""
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from cpool_vision.inspect import SupportStatistics, context_maps, support_statistics

from ..device import Precision

_IMAGES = 64


def images_of_patches(batch: dict[str, torch.Tensor], model: Any) -> torch.Tensor | None:
    """Images of a NaFlex batch `(B, C, H, W)`, put together from their patches: those of the most frequent size.

    None if no image has all of its patches.
    """
    coord, valid, patches = batch['patch_coord'], batch['patch_valid'], batch['patches'].flatten(2)
    sizes = (coord * valid[..., None]).amax(1) + 1
    whole = valid.sum(1) == sizes.prod(1)
    if not whole.any():
        return None
    (rows, columns), _ = Counter(map(tuple, sizes[whole].tolist())).most_common(1)[0]
    alike = whole & (sizes == sizes.new_tensor((rows, columns))).all(1)
    height, width = model.get_patch_size()
    pixels = patches[alike, :rows * columns].unflatten(1, (rows, columns))
    if getattr(getattr(model, 'embeds', None), 'channels_last', True):
        pixels = pixels.unflatten(3, (height, width, -1)).permute(0, 5, 1, 3, 2, 4)
    else:
        pixels = pixels.unflatten(3, (-1, height, width)).permute(0, 3, 1, 4, 2, 5)
    return pixels.flatten(4).flatten(2, 3)


@contextmanager
def keep_first_input(model: Any) -> Iterator[list[torch.Tensor]]:
    """Puts up to 64 images of the first batch that the model gets into the list that it yields; none if scripted.

    Of a batch of patches they are those of the most frequent size.
    """
    kept: list[torch.Tensor] = []
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        yield kept
        return

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if kept or not inputs:
            return
        images = images_of_patches(inputs[0], model) if isinstance(inputs[0], dict) else inputs[0]
        if isinstance(images, torch.Tensor):
            kept.append(images[:_IMAGES].clone())

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
        images: `(B, C, H, W)`, normalized, on the device of the model.
        precision: as in validation.
    """
    with precision.autocast():
        try:
            maps = context_maps(unwrap_model(model), images)
        except ValueError:  # it has no context pool
            return []
    return support_statistics(maps, (images.shape[-2], images.shape[-1]))
