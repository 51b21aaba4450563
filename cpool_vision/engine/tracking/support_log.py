"""Support statistics on the first validation batch, without a further pass over the data."""
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from cpool_vision.inspect import SupportStatistics, context_maps, support_statistics

from ..device import Precision

_IMAGES = 64


class PatchModel(Protocol):
    """A model that takes NaFlex batches, such as `timm.models.NaFlexVit`."""

    def get_patch_size(self) -> tuple[int, int]:
        """Returns height and width of a patch."""


def images_of_patches(batch: dict[str, torch.Tensor], model: PatchModel) -> torch.Tensor | None:
    """Assembles the images of a NaFlex batch that have the most frequent size.

    Returns:
        `(B, C, H, W)`, or None if every image lacks patches.
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
def keep_first_input(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keeps up to 64 images of the first batch that the model receives.

    Yields:
        A list that the images are added to. It stays empty if the model is scripted. Of a NaFlex batch, the images are
        those of the most frequent size.
    """
    kept: list[torch.Tensor] = []
    if isinstance(model, torch.jit.ScriptModule):
        yield kept
        return

    def hook(_: nn.Module, inputs: tuple[object, ...]) -> None:
        if kept or not inputs:
            return
        batch = inputs[0]
        images = images_of_patches(batch, unwrap_model(model)) if isinstance(batch, dict) else batch
        if isinstance(images, torch.Tensor):
            kept.append(images[:_IMAGES].clone())

    handle = model.register_forward_pre_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


@torch.inference_mode()
def measure_supports(model: nn.Module, images: torch.Tensor, precision: Precision) -> list[SupportStatistics]:
    """Measures the supports of each context pool. Leaves random state, batch norm statistics and modes unchanged.

    Args:
        model: The validated model; may be wrapped.
        images: `(B, C, H, W)`, normalized, on the device of the model.
        precision: Precision of the validation.

    Returns:
        Statistics of each context pool; empty for a model without context pools.
    """
    with precision.autocast():
        try:
            maps = context_maps(unwrap_model(model), images)
        except ValueError:  # the model has no context pool
            return []
    return support_statistics(maps, (images.shape[-2], images.shape[-1]))
