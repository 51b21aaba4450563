"""Scores of trained stacks: top-1, or intersection over union, overall and by size of object."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tasks import Recipe, Split

# Borders between small, middle and large objects, in 64ths of the side; the middle of `cpool/shapes-seg` lies at 8.
SIZE_BORDERS = (6.0, 11.0)
SIZE_NAMES = ('small', 'middle', 'large')


def confusion(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Counts `(K, K)`, rows the target, columns the prediction."""
    return torch.bincount(targets.long() * classes + predicted.long(), minlength=classes ** 2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """In percent, over the classes that occur, the ground (class 0) left out."""
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    present = (union > 0).nonzero().flatten()
    present = present[present > 0]
    return float(100 * (hit[present] / union[present]).mean()) if len(present) else 0.


def size_of(radii: Tensor, image_size: int) -> Tensor:
    """0, 1 or 2 for pixels of small, middle and large objects, -1 for the ground."""
    borders = torch.tensor(SIZE_BORDERS, device=radii.device) * image_size / 64
    return torch.bucketize(radii.float(), borders).masked_fill(radii <= 0, -1)


def score_stack(
        predict: Callable[[Tensor], Tensor], seeds: int, recipe: Recipe, split: Split, batch: int = 100,
) -> list[dict[str, Any]]:
    """Scores of every net of a stack in percent.

    For dense targets: `foreground_iou`, of what is more likely an object than ground, whatever its class;
    `object_accuracy`, the share of the objects' pixels whose class has the largest output among the classes of objects;
    `miou`, over these classes. All also by the size of the objects: the pixels of other objects are left out.

    Args:
        predict: From uint8 images `(B, 3, H, W)` to outputs `(S, B, K, ...)`.
        seeds: S.
        recipe: The task.
        split: Images and targets.
        batch: Images at a time.
    """
    batches = range(0, len(split.images), batch)
    if split.radii is None:
        hits = torch.zeros(seeds)
        for start in batches:
            with torch.no_grad():
                predicted = predict(split.images[start:start + batch]).argmax(2)
            hits += (predicted == split.targets[start:start + batch]).sum(1).cpu()
        return [{'top1': float(100 * hit / len(split.images))} for hit in hits]
    classes, parts = recipe.num_classes, 1 + len(SIZE_NAMES)
    counts = torch.zeros(seeds, parts, classes, classes, dtype=torch.long)
    found, named = torch.zeros(seeds, parts, 2), torch.zeros(seeds, parts, 2)
    for start in batches:
        targets = split.targets[start:start + batch]
        with torch.no_grad():
            outputs = predict(split.images[start:start + batch]).float()
        size = size_of(split.radii[start:start + batch], recipe.image_size)
        predicted = outputs.argmax(2)
        objects = outputs[:, :, 1:].logsumexp(2) > outputs[:, :, 0]
        right = outputs[:, :, 1:].argmax(2) + 1 == targets
        for k in range(parts):
            here = size >= 0 if k == 0 else size == k - 1
            keep = here | (size == -1)
            for s in range(seeds):
                counts[s, k] += confusion(predicted[s][keep], targets[keep], classes).cpu()
                found[s, k] += torch.stack([(objects[s] & here).sum(), ((objects[s] & keep) | here).sum()]).cpu()
                named[s, k] += torch.stack([(right[s] & here).sum(), here.sum()]).cpu()
    rows = []
    for s in range(seeds):
        row = {}
        for k, suffix in enumerate(('', *(f'_{name}' for name in SIZE_NAMES))):
            row[f'foreground_iou{suffix}'] = float(100 * found[s, k, 0] / found[s, k, 1].clamp(min=1))
            row[f'object_accuracy{suffix}'] = float(100 * named[s, k, 0] / named[s, k, 1].clamp(min=1))
            row[f'miou{suffix}'] = mean_iou(counts[s, k])
        rows.append(row)
    return rows
