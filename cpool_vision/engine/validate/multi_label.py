"""Multi-label metrics: precision, recall, F1, average precision and loss, as exact as those in `metrics`."""
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
_CURVED = 20  # up to so many classes, each has its own precision-recall curve
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _fixed_rows(values: torch.Tensor) -> torch.Tensor:
    """Sums values >= 0, `(B,)` or `(B, C)`, as integer parts and fractions in units of 2^-40: `(2,)`, int64.

    Values are rounded one by one and capped at 2^40.
    """
    values = values.clamp(max=float(_FRACTION))
    whole = values.floor()
    parts = torch.stack([whole.long(), ((values - whole) * _FRACTION).round().long()])
    return _carry(_carry(parts.flatten(2).sum(-1) if parts.ndim > 2 else parts).sum(-1))


def _carry(parts: torch.Tensor) -> torch.Tensor:
    """Moves whole units from the fractions to the integer parts."""
    return torch.stack([parts[0] + (parts[1] >> FRACTION_BITS), parts[1] & (_FRACTION - 1)])


def _percent(above: int, below: int) -> float:
    return 100 * above / below if below else 0.


def retrieved(scores: NDArray[np.float32], positive: NDArray[np.bool_],
              ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts the positives, and all entries, that reach each distinct score, in descending order of the scores.

    Args:
        scores: Finite scores `(N,)`.
        positive: Whether each entry is positive, `(N,)`.
    """
    if not scores.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # the sum turns -0 into 0
    order = np.where(bits < 0, -1 - (bits & 0x7fffffff), bits)  # integers that sort like the scores
    keys = np.sort(order << 1 | positive)[::-1]
    ends = np.append(np.flatnonzero(keys[1:] >> 1 != keys[:-1] >> 1), len(keys) - 1)
    return np.cumsum(keys & 1)[ends], ends + 1


def average_precision(hits: NDArray[np.int64], taken: NDArray[np.int64], positives: int) -> float:
    """Computes the sum over thresholds of precision times gain in recall, in [0, 1]; NaN without positives.

    Args:
        hits, taken: Result of `retrieved`.
        positives: Number of positives, including those without a score.
    """
    if not positives:
        return math.nan
    gained = np.diff(hits, prepend=0)
    kept = gained > 0
    return math.fsum((gained[kept] * hits[kept] / taken[kept]).tolist()) / positives


def _curve(hits: NDArray[np.int64], taken: NDArray[np.int64], positives: int) -> Curve:
    """Returns recall and precision in percent at up to 500 thresholds."""
    chosen = np.unique(np.linspace(0, max(len(hits) - 1, 0), min(len(hits), _CURVE_POINTS)).round().astype(int))
    return 100 * hits[chosen] / max(positives, 1), 100 * hits[chosen] / taken[chosen]


@dataclass
class LabelFigures:
    """Results by label.

    Attributes:
        images: Number of images.
        positives: `(C,)` int64, number of images with the label.
        hits: `(C,)` int64, number of these for which the label is predicted.
        predicted: `(C,)` int64, number of images for which the label is predicted.
        ap: `(C,)` float64, average precision in percent; NaN for a label without images.
        micro_ap: Average precision in percent over all pairs of image and label.
        micro: Recall and precision in percent over all these pairs, in descending order of the threshold.
        curves: Recall and precision of each label; empty for more than 20 labels.
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
        """Returns `precision`, `recall` or `f1` of each label in percent; 0 where the denominator is 0."""
        above, below = {'precision': (self.hits, self.predicted), 'recall': (self.hits, self.positives),
                        'f1': (2 * self.hits, self.positives + self.predicted)}[name]
        return [_percent(*pair) for pair in zip(above.tolist(), below.tolist(), strict=True)]

    def mean_ap(self) -> float:
        """Returns the mean of the average precision in percent, over labels with images."""
        present = self.ap[self.positives > 0].tolist()
        return math.fsum(present) / len(present) if present else math.nan

    def averaged(self) -> dict[str, float]:
        """Returns precision, recall and F1 in percent: `micro_*` over image-label pairs, `macro_*` over labels."""
        hits, positives, predicted = (int(each.sum()) for each in (self.hits, self.positives, self.predicted))
        figures = {'micro_f1': _percent(2 * hits, positives + predicted), 'micro_precision': _percent(hits, predicted),
                   'micro_recall': _percent(hits, positives)}
        for name in ('f1', 'precision', 'recall'):
            figures[f'macro_{name}'] = math.fsum(self.column(name)) / len(self.hits)
        return figures


class LabelTally(Tally):
    """Multi-label loss, average precision, precision, recall, F1 and exact matches.

    All metrics except average precision are computed from integer sums. Average precision needs all scores: 5 bytes per
    image and label on the device, which the processes exchange at the end. torchmetrics' `MultilabelAveragePrecision`
    is not used: it takes NaN or infinite logits for scores, and sums in float32.

    Images without labels count like any other. Images labeled `UNREADABLE` are only counted. For images with a NaN or
    infinite logit no label is predicted at any threshold; they never count as exact matches and are left out of the
    loss.

    Args:
        device: Device of the outputs.
        num_classes: Number of outputs.
        threshold: Probability at and above which a label is predicted.

    Attributes:
        columns: Metrics written to summary.csv.
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
        """Removes all images."""
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
        self.counts += torch.stack([  # as in `Tally`, but exact matches and images without labels replace top-1, top-5
            known.sum(), (valid & guess.eq(positive).all(dim=-1)).sum(), (known & ~positive.any(dim=-1)).sum(),
            (known & ~finite).sum(), (~known).sum(), torch.zeros_like(known.sum())])
        self.label_counts += torch.stack([positive.sum(dim=0), hit.sum(dim=0), guess.sum(dim=0)])

        # softplus rounds the last few elements of a tensor differently, log_softmax does not
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
        """Returns the metrics so far, as text for a log line and for a progress bar."""
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
        """Returns the metrics in `columns` and numbers of images, of this process.

        Metrics are in percent except `loss`, the mean binary cross-entropy over images and labels (natural logarithm).
        The numbers are `images`, `nonfinite`, `unreadable` and `empty` (images without labels). Formulas are in
        docs/validation.md.
        """
        return self._measure(False)[0]

    def compute_over_processes(self) -> dict[str, float]:
        """`read` over the images of all processes. Every process must call it."""
        return self._measure(True)[0]

    def compute_all(self) -> tuple[dict[str, float], LabelFigures]:
        """Returns `compute_over_processes`, and results by label over all processes."""
        return self._measure(True)
