"""Images and targets of a task, whole and on the device: a run is many small steps, and decoding would dwarf them."""
import dataclasses
import functools
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpool_vision.data.shapes_seg import ShapesSegDataset

SPLITS = ('train', 'selection', 'test')
TASKS = ('cifar10', 'shapes-seg')
_OURS = {'train': 'train', 'selection': 'validation', 'test': 'test'}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Task and training of a run: the `flags` of a stacked study.

    Attributes:
        task: One of `TASKS`.
        train_samples, selection_samples, test_samples: Images of each split; of `cifar10` the first of every class for
            training and the last of every class of the training set for selection.
        image_size: Side in pixels.
        mean_radius, size_range: As in `ShapesSegDataset`.
        ground_weight: Weight of the ground's pixels in a dense loss; those of objects have 1.
        epochs, batch_size, lr, weight_decay, smoothing, clip: AdamW with gradients clipped to the norm `clip`.
        warmup: Share of the steps in which the learning rate rises; it then falls along half a cosine to a hundredth.
        augment: Flips; for `cifar10` shifts by up to four pixels too.
        amp: bfloat16 autocast.
    """
    task: str = 'cifar10'
    train_samples: int = 2000
    selection_samples: int = 1000
    test_samples: int = 1000
    image_size: int = 32
    mean_radius: float = 8.0
    size_range: float = 4.0
    ground_weight: float = 1.0
    epochs: int = 8
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    smoothing: float = 0.0
    clip: float = 1.0
    warmup: float = 0.1
    augment: bool = True
    amp: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f'task must be one of {TASKS}, got {self.task!r}')
        if self.train_samples < self.batch_size:
            raise ValueError(
                f'train_samples must be at least batch_size, got {self.train_samples} and {self.batch_size}')

    @classmethod
    def of(cls, settings: dict[str, Any]) -> 'Recipe':
        """The recipe among the settings of a run.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {k: v for k, v in settings.items() if k not in ('model', 'model_kwargs', 'seed')}
        for key in given:
            if key not in known:
                raise ValueError(f"unknown flag {key!r} of a stacked study: choose from {', '.join(sorted(known))}")
        return cls(**given)

    @property
    def dense(self) -> bool:
        """Whether every pixel has a target."""
        return self.task == 'shapes-seg'

    @property
    def num_classes(self) -> int:
        return len(ShapesSegDataset.classes) if self.dense else 10

    @property
    def metric(self) -> str:
        """Name of the score of a run in percent."""
        return 'foreground_iou' if self.dense else 'top1'


@dataclasses.dataclass(frozen=True)
class Split:
    """Images `(N, 3, H, W)` uint8 with their targets: `(N,)`, or `(N, H, W)` with the objects' radii in pixels."""
    images: Tensor
    targets: Tensor
    radii: Tensor | None = None

    def to(self, device: torch.device) -> 'Split':
        return Split(*(
            None if t is None else t.to(device) for t in (self.images, self.targets, self.radii)))  # type: ignore[arg-type]


def _crowd(recipe: Recipe, split: str, samples: int) -> Split:
    crowd = ShapesSegDataset(
        _OURS[split], samples, recipe.image_size, recipe.mean_radius, recipe.size_range).arrays()
    images = torch.from_numpy(np.ascontiguousarray(crowd.pixels.transpose(0, 3, 1, 2)))
    return Split(images, torch.from_numpy(crowd.masks), torch.from_numpy(crowd.radii).half())


@functools.lru_cache(maxsize=1)
def _archive(file: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Contents of a tar archive of `.../SPLIT/CLASS/FILE`, by these three names."""
    found: dict[str, dict[str, dict[str, bytes]]] = {}
    with tarfile.open(file, 'r|*') as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                split, name, image = member.name.split('/')[-3:]
                found.setdefault(split, {}).setdefault(name, {})[image] = content.read()
    return found


def _folder(root: Path, split: str, samples: int, size: int) -> Split:
    """Images of class folders by file name, as many of each class: the first, or the last for selection."""
    name = 'validation' if split == 'test' else 'train'
    classes: list[list[Any]]  # of paths, or of what the archive holds
    if root.is_dir():
        classes = [sorted(path.iterdir()) for path in sorted((root / name).iterdir()) if path.is_dir()]
    else:
        found = sorted(_archive(root)[name].items())
        classes = [[io.BytesIO(files[key]) for key in sorted(files)] for _, files in found]
    each = samples // len(classes)
    images, targets = [], []
    for label, files in enumerate(classes):
        for file in files[-each:] if split == 'selection' else files[:each]:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert('RGB').resize((size, size))))
            targets.append(label)
    pixels = np.stack(images).transpose(0, 3, 1, 2)
    return Split(torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(targets, dtype=torch.uint8))


def load_split(recipe: Recipe, split: str, cache: Path, data_dir: Path | None = None) -> Split:
    """A split of the task on the CPU, kept in the folder `cache` once it was made.

    Raises:
        ValueError: the task needs `data_dir`, which is None.
    """
    samples = getattr(recipe, f'{split}_samples')
    sizes = f'-r{recipe.mean_radius:g}-x{recipe.size_range:g}' if recipe.dense else ''
    file = cache / f'{recipe.task}-{split}-{samples}-{recipe.image_size}{sizes}.pt'
    if file.exists():
        return Split(**torch.load(file, weights_only=True))
    if recipe.dense:
        made = _crowd(recipe, split, samples)
    elif data_dir is None:
        raise ValueError(f'task {recipe.task!r} needs --data-dir, a folder or a tar archive of train/CLASS/* and '
                         f'validation/CLASS/*')
    else:
        made = _folder(data_dir, split, samples, recipe.image_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix('.part')
    torch.save(dict(images=made.images, targets=made.targets, radii=made.radii), part)
    part.replace(file)
    return made


def normalize(images: Tensor) -> Tensor:
    """uint8 levels as floats of about unit variance."""
    return (images.float() - 120) / 60


def augment(images: Tensor, targets: Tensor, draws: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    """Flips left and right, and shifts images without dense targets by up to four pixels with mirrored borders.

    Args:
        images: `(N, 3, H, W)`.
        targets: `(N,)`, or `(N, H, W)` if `dense`: flipped with the images.
        draws: `(N, 3)` integers in 0 to 8: two shifts, and a flip where the last is even.
        dense: Whether the targets are dense.
    """
    n, _, height, width = images.shape
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = torch.where(draws[:, 2:] % 2 == 0, columns.flip(1), columns)
    if dense:
        flipped = images.gather(3, columns[:, None, None].expand(images.shape))
        return flipped, targets.gather(2, columns[:, None].expand(targets.shape))
    rows = torch.arange(height, device=images.device).expand(n, height) + draws[:, :1] - 4
    columns = columns + draws[:, 1:2] - 4

    def mirrored(at: Tensor, size: int) -> Tensor:
        return size - 1 - (size - 1 - at.abs()).abs()
    rows, columns = mirrored(rows, height), mirrored(columns, width)
    images = images.gather(2, rows[:, None, :, None].expand(images.shape))
    return images.gather(3, columns[:, None, None].expand(images.shape)), targets
