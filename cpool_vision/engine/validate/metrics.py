"""Accuracy, likelihood and calibration from integer sums: exact for any order of the images and number of processes."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

from ..data.unreadable import UNREADABLE

CONFUSION_LIMIT = 2048  # classes; a larger matrix would take over 32 MB
BINS = 15
FRACTION_BITS = 40  # the sum of 2^23 values of 2^40 fits 63 bits
_Z95 = 1.959963984540054


def wilson_interval(hits: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Computes the confidence interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927); 95 % by default.

    Args:
        hits: Number of successes.
        total: Number of trials.
        z: Quantile of the normal distribution.

    Returns:
        Lower and upper bound in [0, 1]; NaN without trials.
    """
    if not total:
        return math.nan, math.nan
    share, weight = hits / total, z * z / total
    center = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    # at 0 and 1 the bound is exact; rounding would miss it
    return (0. if not hits else center - half), (1. if hits == total else center + half)


def _intervals(images: int, **hits: int) -> dict[str, float]:
    """Returns NAME_low and NAME_high in percent: 95 % confidence intervals of `hits` in `images`."""
    return {f'{name}_{side}': 100 * bound for name, count in hits.items()
            for side, bound in zip(('low', 'high'), wilson_interval(count, images), strict=True)}


def _fixed_point(values: torch.Tensor) -> torch.Tensor:
    """Sums values >= 0 as integer parts and fractions in units of 2^-40: `(2,)`, int64. Values are capped at 2^40."""
    values = values.clamp(max=2. ** FRACTION_BITS)
    whole = values.floor()
    return torch.stack([whole.long().sum(), ((values - whole) * 2 ** FRACTION_BITS).round().long().sum()])


def mean_of_parts(parts: list[int], count: int) -> float:
    """Returns the mean of `count` values from their sum, see `_fixed_point`; NaN without values."""
    return ((parts[0] << FRACTION_BITS) + parts[1]) / (count << FRACTION_BITS) if count else math.nan


def _accuracy(hits: int, total: int) -> float:
    return 100 * hits / total if total else math.nan


class Tally(Metric):
    """Loss, top-1 and top-5 accuracy.

    A torchmetrics `Metric`, for its synchronization between processes. torchmetrics' own classes are not used:
    `MulticlassAccuracy` takes NaN for class 0, and the float sums of others depend on the order of the images. Adding a
    batch does not synchronize the device.

    Images labeled `UNREADABLE` are only counted. Images with a NaN or infinite logit count as errors and are left out
    of the loss. Images whose label is not a class are counted as unlabeled.

    Args:
        device: Device of the outputs.

    Attributes:
        columns: Metrics written to summary.csv.
    """

    columns: tuple[str, ...] = ('loss', 'top1', 'top5')
    full_state_update = False
    counts: torch.Tensor
    sums: torch.Tensor
    _sums = 1

    def __init__(self, device: torch.device) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._add('counts', 6)  # images, top-1, top-5, not finite, unreadable, unlabeled
        self._add('sums', self._sums, 2)
        self.to(device)

    def _add(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx='sum')

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch of logits `(B, classes)` and targets, here class indices `(B,)`."""
        if len(target):
            with torch.no_grad():
                self._count(output.detach().float(), target)

    def _count(self, output: torch.Tensor, target: torch.Tensor) -> None:
        known = (target >= 0) & (target < output.shape[-1])
        unreadable = target == UNREADABLE
        finite = output.isfinite().all(dim=-1)
        valid = known & finite
        output, target = output.masked_fill(~finite[:, None], 0), target.masked_fill(~known, 0)
        ranked = output.topk(min(5, output.shape[-1]), dim=-1).indices
        hits = ranked.eq(target[:, None]) & valid[:, None]
        self.counts += torch.stack([
            known.sum(), hits[:, 0].sum(), hits.sum(), (known & ~finite).sum(), unreadable.sum(),
            (~known & ~unreadable).sum()])
        # float64 if the device has it: rounding to 2^-40 then hides differences in the order of additions
        wide = output if output.device.type == 'mps' else output.double()
        self._score(wide.log_softmax(dim=-1), ranked[:, 0], target, known, valid)

    def _score(self, log_prob: torch.Tensor, guess: torch.Tensor, target: torch.Tensor, known: torch.Tensor,
               valid: torch.Tensor) -> None:
        self.sums[0] += _fixed_point(-log_prob.gather(1, target[:, None])[:, 0].masked_fill(~valid, 0))

    def read(self) -> dict[str, float]:
        """Returns `loss` (natural logarithm), `top1` and `top5` in percent, and numbers of images.

        The numbers are `images`, `nonfinite`, `unreadable` and `unlabeled`. Metrics are NaN without images.
        """
        images, top1, top5, nonfinite, unreadable, unlabeled = self.counts.tolist()
        return {'loss': mean_of_parts(self.sums[0].tolist(), images - nonfinite), 'top1': _accuracy(top1, images),
                'top5': _accuracy(top5, images), 'images': images, 'nonfinite': nonfinite, 'unreadable': unreadable,
                'unlabeled': unlabeled}

    def headline(self) -> tuple[str, str]:
        """Returns the metrics so far, as text for a log line and for a progress bar."""
        now = self.read()
        return (f'loss {now["loss"]:.4f}  top1 {now["top1"]:.3f}  top5 {now["top5"]:.3f}', f'top1 {now["top1"]:.2f}')

    def compute(self) -> dict[str, float]:
        """Same as `read`, under torchmetrics' name."""
        return self.read()

    def compute_over_processes(self) -> dict[str, float]:
        """`read` over the images of all processes. Every process must call it."""
        with self.sync_context():
            return self.read()  # `compute` would end the context


@dataclass
class ClassFigures:
    """Results by class and by confidence.

    Attributes:
        images: `(C,)` int64, number of images of each class.
        hits: `(C,)` int64, number of these that are classified correctly.
        predicted: `(C,)` int64, number of images classified as the class.
        confusion: `(C, C)` int64, number of images by true class (row) and predicted class (column), without images
            that have NaN or infinite logits. None for more than `CONFUSION_LIMIT` classes.
        bin_images: `(15,)` int64, number of images by confidence: bin b is b/15 < confidence <= (b + 1)/15.
        bin_hits: `(15,)` int64, number of these that are classified correctly.
        bin_confidence: `(15,)` float64, mean confidence in each bin; NaN for an empty bin.
    """

    images: NDArray[np.int64]
    hits: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confusion: NDArray[np.int64] | None
    bin_images: NDArray[np.int64]
    bin_hits: NDArray[np.int64]
    bin_confidence: NDArray[np.float64] = field(repr=False)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Accuracy of each class in percent, `(C,)`; NaN for a class without images."""
        return np.divide(100. * self.hits, self.images, out=np.full(len(self.images), np.nan), where=self.images > 0)

    def averaged(self, average: str) -> dict[str, float]:
        """Returns `precision`, `recall` and `f1_score` in percent, as torchmetrics does for finite logits.

        Args:
            average: 'micro' averages over images, 'macro' over classes that occur as label or prediction, 'weighted'
                over classes weighted by their number of images.
        """
        hits, images, predicted = (column.astype(float) for column in (self.hits, self.images, self.predicted))
        if average == 'micro':
            hits, images, predicted = (column.sum(keepdims=True) for column in (hits, images, predicted))
        weight = images if average == 'weighted' else (images + predicted > 0).astype(float)
        pairs = {'precision': (hits, predicted), 'recall': (hits, images), 'f1_score': (2 * hits, images + predicted)}
        total = weight.sum()
        return {name: float(100 * (weight * above / np.maximum(below, 1)).sum() / total) if total else math.nan
                for name, (above, below) in pairs.items()}


class ClassTally(Tally):
    """Adds per-class accuracy, a confusion matrix, Brier score and calibration error to `Tally`.

    Unlike torchmetrics' `MulticlassCalibrationError`, it keeps counts and sums of 15 bins instead of every confidence.

    Args:
        device: Device of the outputs.
        num_classes: Number of outputs.
    """

    class_counts: torch.Tensor
    bins: torch.Tensor
    confusion: torch.Tensor
    _sums = 2  # likelihood, Brier

    def __init__(self, device: torch.device, num_classes: int) -> None:
        super().__init__(device)
        self.num_classes = num_classes
        self._add('class_counts', 3, num_classes)  # images, hits, predictions
        self._add('bins', 4, BINS)  # images, hits, confidence in whole parts and fractions
        self.has_confusion = num_classes <= CONFUSION_LIMIT
        if self.has_confusion:
            self._add('confusion', num_classes * num_classes)
        self.to(device)

    def _score(self, log_prob: torch.Tensor, guess: torch.Tensor, target: torch.Tensor, known: torch.Tensor,
               valid: torch.Tensor) -> None:
        super()._score(log_prob, guess, target, known, valid)
        prob = log_prob.exp()
        others = prob.scatter(1, target[:, None], 0)
        miss = 1 - prob.gather(1, target[:, None])[:, 0]
        self.sums[1] += _fixed_point((others.square().sum(dim=-1) + miss.square()).masked_fill(~valid, 0))

        # rows that do not count go to an extra last cell, so that no shape depends on the data
        hit = valid & (guess == target)
        classes, none = self.num_classes, torch.full_like(target, self.num_classes)
        self.class_counts += torch.stack([
            torch.bincount(torch.where(rows, label, none), minlength=classes + 1)[:classes]
            for rows, label in ((known, target), (hit, target), (valid, guess))])
        if self.has_confusion:
            cell = torch.where(valid, target * classes + guess, torch.full_like(target, classes * classes))
            self.confusion += torch.bincount(cell, minlength=classes * classes + 1)[:-1]

        confidence = prob.gather(1, guess[:, None])[:, 0]
        index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        member = torch.nn.functional.one_hot(torch.where(valid, index, torch.full_like(index, BINS)), BINS + 1)[:, :-1]
        parts = (confidence * 2. ** FRACTION_BITS).round().long()
        fraction = parts & (2 ** FRACTION_BITS - 1)
        self.bins += torch.stack([(member * weight[:, None]).sum(dim=0) for weight in (
            valid.long(), hit.long(), parts >> FRACTION_BITS, fraction)])

    def figures(self) -> ClassFigures:
        """Returns results by class and by confidence, of the images added in this process."""
        images, hits, predicted = self.class_counts.cpu().numpy().copy()
        count, correct, whole, fraction = self.bins.tolist()
        confidence = [mean_of_parts([w, f], n) for w, f, n in zip(whole, fraction, count, strict=True)]
        matrix = None
        if self.has_confusion:
            matrix = self.confusion.cpu().numpy().reshape(self.num_classes, self.num_classes).copy()
        return ClassFigures(images, hits, predicted, matrix, np.array(count), np.array(correct), np.array(confidence))

    def read(self) -> dict[str, float]:
        """Returns `Tally.read` plus `macro_accuracy`, `ece`, `mce`, `brier`, and 95 % intervals of top-1 and top-5.

        All of these are in percent except `brier`. The macro accuracy averages over classes with images. Formulas are
        in docs/validation.md.
        """
        metrics = super().read()
        images, top1, top5, nonfinite = self.counts[:4].tolist()
        scored = images - nonfinite
        figures = self.figures()
        gaps = [abs(hits / count - confidence) for count, hits, confidence in zip(
            figures.bin_images.tolist(), figures.bin_hits.tolist(), figures.bin_confidence.tolist(), strict=True)
            if count]
        weights = [count / scored for count in figures.bin_images.tolist() if count]
        present = figures.accuracy[figures.images > 0].tolist()
        metrics |= _intervals(images, top1=top1, top5=top5)
        metrics['macro_accuracy'] = math.fsum(present) / len(present) if present else math.nan
        metrics['brier'] = mean_of_parts(self.sums[1].tolist(), scored)
        metrics['ece'] = 100 * math.fsum(w * g for w, g in zip(weights, gaps, strict=True)) if scored else math.nan
        metrics['mce'] = 100 * max(gaps) if scored else math.nan
        return metrics

    def compute_all(self) -> tuple[dict[str, float], ClassFigures]:
        """Returns `compute_over_processes`, and results by class and by confidence over all processes."""
        with self.sync_context():
            return self.read(), self.figures()


class MultiLabelTally(Metric):
    """Top-1 and top-5 accuracy with several correct classes per image (Beyer et al., arXiv:2006.07159, for ImageNet).

    Images without correct classes do not count. Images with a NaN or infinite logit count as errors.

    Args:
        labels: Correct classes of each image of the dataset.
        device: Device of the outputs.
    """

    full_state_update = False
    counts: torch.Tensor

    def __init__(self, labels: list[list[int]], device: torch.device) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.labels = labels
        self.add_state('counts', torch.zeros(3, dtype=torch.int64), dist_reduce_fx='sum')
        self.to(device)

    def update(self, output: torch.Tensor, target: torch.Tensor, positions: Sequence[int]) -> None:
        """Adds a batch.

        Args:
            output: Logits `(B, classes)`.
            target: Labels `(B,)`; only `UNREADABLE` matters.
            positions: Index of each image in the dataset.
        """
        if not len(target):
            return
        output = output.detach().float()
        ranked = output.nan_to_num().topk(min(5, output.shape[-1]), dim=-1).indices.tolist()
        use = (target != UNREADABLE).tolist()
        finite = output.isfinite().all(dim=-1).tolist()
        rows = [(guesses, self.labels[position], sound) for guesses, position, used, sound in zip(
            ranked, positions, use, finite, strict=True) if used and self.labels[position]]
        hits = [[sound and guess in right for guess in guesses] for guesses, right, sound in rows]
        self.counts += torch.tensor([len(rows), sum(hit[0] for hit in hits), sum(map(any, hits))],
                                    device=self.counts.device)

    def compute(self) -> dict[str, float]:
        """Returns `top1` and `top5` in percent, their 95 % intervals, and the number of `images` that count."""
        images, top1, top5 = self.counts.tolist()
        return {'top1': _accuracy(top1, images), 'top5': _accuracy(top5, images), 'images': images,
                **_intervals(images, top1=top1, top5=top5)}

    def compute_over_processes(self) -> dict[str, float]:
        """`compute` over the images of all processes. Every process must call it."""
        with self.sync_context():
            return self.compute()
