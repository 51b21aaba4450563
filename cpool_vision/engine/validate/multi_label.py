"""Precision, recall, F1, average precision and likelihood of several labels per image, exact like `metrics`."""
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.utilities.distributed import gather_all_tensors

from ..data.multi_label import unreadable_rows
from .metrics import FRACTION_BITS, Tally, mean_of_parts

_FRACTION = 2 ** FRACTION_BITS
_CURVE_POINTS = 500
_CURVED = 20  # classes up to which each has its own curve
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _fixed_rows(values: torch.Tensor) -> torch.Tensor:
    """Sum of values >= 0, `(B,)` or `(B, C)`, as whole parts and fractions of 2^-40: `(2,)`, int64.

    Each value is rounded by itself, and one above 2^40 counts as that.
    """
    values = values.clamp(max=float(_FRACTION))
    whole = values.floor()
    parts = torch.stack([whole.long(), ((values - whole) * _FRACTION).round().long()])
    return _carry(_carry(parts.flatten(2).sum(-1) if parts.ndim > 2 else parts).sum(-1))


def _carry(parts: torch.Tensor) -> torch.Tensor:
    """The same sums with fractions below 1."""
    return torch.stack([parts[0] + (parts[1] >> FRACTION_BITS), parts[1] & (_FRACTION - 1)])


def _percent(above: int, below: int) -> float:
    return 100 * above / below if below else 0.


def retrieved(scores: NDArray[np.float32], positive: NDArray[np.bool_],
              ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many positives, and how many entries, reach each of the distinct scores, from the highest down.

    Args:
        scores: `(N,)`, finite.
        positive: `(N,)`.
    """
    if not scores.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # the sum makes -0 the same as 0
    order = np.where(bits < 0, -1 - (bits & 0x7fffffff), bits)  # integers in the order of the scores
    keys = np.sort(order << 1 | positive)[::-1]
    ends = np.append(np.flatnonzero(keys[1:] >> 1 != keys[:-1] >> 1), len(keys) - 1)
    return np.cumsum(keys & 1)[ends], ends + 1


def average_precision(hits: NDArray[np.int64], taken: NDArray[np.int64], positives: int) -> float:
    """Sum over thresholds of precision times gain in recall, 0 to 1; NaN without positives.

    Args:
        hits, taken: see `retrieved`.
        positives: how many there are, those that are never retrieved included.
    """
    if not positives:
        return math.nan
    gained = np.diff(hits, prepend=0)
    kept = gained > 0
    return math.fsum((gained[kept] * hits[kept] / taken[kept]).tolist()) / positives


def _curve(hits: NDArray[np.int64], taken: NDArray[np.int64], positives: int) -> Curve:
    """Recall and precision in percent at up to 500 thresholds."""
    places = np.unique(np.linspace(0, max(len(hits) - 1, 0), min(len(hits), _CURVE_POINTS)).round().astype(int))
    return 100 * hits[places] / max(positives, 1), 100 * hits[places] / taken[places]


@dataclass
class LabelFigures:
    """Figures by label.

    Attributes:
        images: how many were measured.
        positives: `(C,)` int64, images that have the label.
        hits: `(C,)` int64, those of them for which it is predicted.
        predicted: `(C,)` int64, images for which it is predicted.
        ap: `(C,)` float64, average precision in percent, NaN for a label that no image has.
        micro_ap: average precision in percent over all pairs of image and label.
        micro: recall and precision in percent over all these pairs, by falling threshold.
        curves: the same of each label; none for more than 20 labels.
    """

    images: int
    positives: NDArray[np.int64]
    hits: NDArray[np.int64]
    predicted: NDArray[np.int64]
    ap: NDArray[np.float64]
    micro_ap: float
    micro: Curve
    curves: list[Curve]

    def column(self, name: str) -> list[float]:
        """`precision`, `recall` or `f1` of each label in percent, 0 where nothing is divided by nothing."""
        above, below = {'precision': (self.hits, self.predicted), 'recall': (self.hits, self.positives),
                        'f1': (2 * self.hits, self.positives + self.predicted)}[name]
        return [_percent(*pair) for pair in zip(above.tolist(), below.tolist(), strict=True)]

    def mean_ap(self) -> float:
        """Mean average precision over the labels that an image has."""
        present = self.ap[self.positives > 0].tolist()
        return math.fsum(present) / len(present) if present else math.nan

    def averaged(self) -> dict[str, float]:
        """Precision, recall and F1: `micro_...` over all pairs of image and label, `macro_...` over labels."""
        hits, positives, predicted = (int(each.sum()) for each in (self.hits, self.positives, self.predicted))
        figures = {'micro_f1': _percent(2 * hits, positives + predicted), 'micro_precision': _percent(hits, predicted),
                   'micro_recall': _percent(hits, positives)}
        for name in ('f1', 'precision', 'recall'):
            figures[f'macro_{name}'] = math.fsum(self.column(name)) / len(self.hits)
        return figures


class LabelTally(Tally):
    """Loss, average precision, precision, recall, F1 and exact matches of several labels per image.

    All but average precision are sums of integers. For that the scores are kept, 5 bytes for each image and label on
    the device; the processes exchange them at the end, and each of them then holds all. torchmetrics'
    `MultilabelAveragePrecision` would take a logit that is not finite for a score, and sums in float32.

    An image without labels is one like others. A row marked `UNREADABLE` is counted as such and nothing else. One with
    a logit that is NaN or infinite is never predicted to have a label: those that it has are missed, at every
    threshold, it matches no set of labels, and is left out of the loss.

    Args:
        device: device of the outputs.
        num_classes: number of outputs.
        threshold: probability from which a label is predicted.

    Attributes:
        columns: figures that summary.csv has.
    """

    columns = ('loss', 'map', 'micro_map', 'micro_f1', 'macro_f1', 'sample_f1', 'micro_precision', 'micro_recall',
               'macro_precision', 'macro_recall', 'exact_match')
    label_counts: torch.Tensor
    _sums = 2  # likelihood, F1 of images

    def __init__(self, device: torch.device, num_classes: int, threshold: float = 0.5) -> None:
        super().__init__(device)
        self.num_classes = num_classes
        self.cut = math.log(threshold) - math.log1p(-threshold)
        self._add('label_counts', 3, num_classes)  # images that have it, hits, predictions
        self.to(device)
        self._scores: list[torch.Tensor] = []
        self._positive: list[torch.Tensor] = []
        self._read: dict[bool, tuple[dict[str, float], LabelFigures]] = {}

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._scores, self._positive, self._read = [], [], {}

    def _count(self, output: torch.Tensor, target: torch.Tensor) -> None:
        known, finite = ~unreadable_rows(target), output.isfinite().all(dim=-1)
        valid = known & finite
        output = output.masked_fill(~finite[:, None], 0)
        wide = output if output.device.type == 'mps' else output.double()
        positive = target.ge(0.5) & known[:, None]
        guess = wide.ge(self.cut) & valid[:, None]
        hit = guess & positive
        self.counts += torch.stack([  # as in `Tally`, with exact matches and images without labels for top-1 and top-5
            known.sum(), (valid & guess.eq(positive).all(dim=-1)).sum(), (known & ~positive.any(dim=-1)).sum(),
            (known & ~finite).sum(), (~known).sum(), torch.zeros_like(known.sum())])
        self.label_counts += torch.stack([positive.sum(dim=0), hit.sum(dim=0), guess.sum(dim=0)])

        # log_softmax rounds a number in the same way wherever it stands; softplus has another path for the last few
        log_prob = torch.stack([wide, torch.zeros_like(wide)], dim=-1).log_softmax(dim=-1)
        target = target.clamp(min=0).to(wide.dtype)
        loss = -(target * log_prob[..., 0] + (1 - target) * log_prob[..., 1])
        either = (guess.sum(dim=-1) + positive.sum(dim=-1)).clamp(min=1)
        self.sums = torch.stack([
            _carry(self.sums[0] + _fixed_rows(loss.masked_fill(~valid[:, None], 0))),
            _carry(self.sums[1] + _fixed_rows(2 * hit.sum(dim=-1).to(wide.dtype) / either))])
        self._scores.append(output.masked_fill(~valid[:, None], math.nan))
        self._positive.append(positive.to(torch.uint8))
        self._read.clear()

    def _loss(self) -> float:
        images, _, _, nonfinite, _, _ = self.counts.tolist()
        return mean_of_parts(self.sums[0].tolist(), (images - nonfinite) * self.num_classes)

    def headline(self) -> tuple[str, str]:
        """What a log line, and what a progress bar says of the figures so far."""
        positives, hits, predicted = self.label_counts.sum(dim=-1).tolist()
        f1 = _percent(2 * hits, positives + predicted)
        return f'loss {self._loss():.4f}  micro_f1 {f1:.3f}', f'micro_f1 {f1:.2f}'

    def _gather(self, parts: list[torch.Tensor], dtype: torch.dtype, shared: bool) -> NDArray[np.generic]:
        whole = torch.cat(parts) if parts else torch.zeros((0, self.num_classes), dtype=dtype, device=self.device)
        if shared and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.cat([part.cpu() for part in gather_all_tensors(whole)]).numpy()
        return whole.cpu().numpy()

    def _figures(self, shared: bool) -> LabelFigures:
        scores = self._gather(self._scores, torch.float32, shared)
        positive = self._gather(self._positive, torch.uint8, shared).astype(bool)
        sound = ~np.isnan(scores[:, 0])
        counts, hits, predicted = self.label_counts.cpu().numpy().copy()
        ap, curves = [], []
        for label, positives in enumerate(counts.tolist()):
            reached = retrieved(scores[sound, label], positive[sound, label])
            ap.append(100 * average_precision(*reached, positives))
            if self.num_classes <= _CURVED:
                curves.append(_curve(*reached, positives))
        total = int(counts.sum())
        reached = retrieved(scores[sound].ravel(), positive[sound].ravel())
        return LabelFigures(int(self.counts[0]), counts, hits, predicted, np.array(ap),
                            100 * average_precision(*reached, total), _curve(*reached, total), curves)

    def _measure(self, shared: bool) -> tuple[dict[str, float], LabelFigures]:
        if shared not in self._read:
            with self.sync_context(should_sync=shared):
                figures = self._figures(shared)
                images, exact, empty, nonfinite, unreadable, _ = self.counts.tolist()
                averages = figures.averaged()
                values = {
                    **averages, 'loss': self._loss(), 'map': figures.mean_ap(), 'micro_map': figures.micro_ap,
                    'sample_f1': 100 * mean_of_parts(self.sums[1].tolist(), images),
                    'exact_match': 100 * exact / images if images else math.nan}
            metrics = {name: values[name] for name in self.columns}
            self._read[shared] = {**metrics, 'images': images, 'nonfinite': nonfinite, 'unreadable': unreadable,
                                  'empty': empty}, figures
        return self._read[shared]

    def read(self) -> dict[str, float]:
        """`columns` and `images`, `nonfinite`, `unreadable` and `empty` (without labels), of this process.

        In percent but for `loss`, the mean binary cross-entropy over images and labels (natural logarithm). For the
        formulas see docs/validation.md.
        """
        return self._measure(False)[0]

    def compute_over_processes(self) -> dict[str, float]:
        """The same over the images of all processes; every process must call it."""
        return self._measure(True)[0]

    def compute_all(self) -> tuple[dict[str, float], LabelFigures]:
        """`compute_over_processes`, and figures by label over all processes."""
        return self._measure(True)
