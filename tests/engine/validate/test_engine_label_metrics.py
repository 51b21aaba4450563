"""Figures of several labels per image: by hand, against torchmetrics and timm, over 1 to 3 processes to the digit."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from test_engine_metrics import CPU, PLAIN, Shares, check_processes
from timm.task.evaluator import MultiLabelClassificationEvaluator
from torchmetrics.classification import (
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

from cpool_vision.engine.data.unreadable import UNREADABLE
from cpool_vision.engine.device import Runtime
from cpool_vision.engine.validate.evaluate import evaluate
from cpool_vision.engine.validate.multi_label import LabelFigures, LabelTally, average_precision, retrieved

LABELS = 6
Rows = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def rows() -> Rows:
    """300 rows with ties, images without labels, unreadable and non-finite ones; no image has the last label."""
    generator = torch.Generator().manual_seed(1)
    output = (torch.randn(300, LABELS, generator=generator) * 2).round(decimals=1)
    target = (torch.rand(300, LABELS, generator=generator) < torch.linspace(0.6, 0., LABELS)).float()
    target[[3, 99]] = UNREADABLE
    output[[5, 99, 200], [0, 1, 4]] = torch.tensor([math.nan, math.nan, math.inf])
    return output, target


def of(output: torch.Tensor, target: torch.Tensor, threshold: float = 0.5) -> tuple[dict[str, float], LabelFigures]:
    tally = LabelTally(CPU, output.shape[-1], threshold)
    tally.update(output, target)
    return tally.compute_all()


def sound(rows: Rows) -> Rows:
    good = rows[0].isfinite().all(1) & (rows[1][:, 0] != UNREADABLE)
    return rows[0][good], rows[1][good]


def test_values_by_hand() -> None:
    output = torch.tensor([[2., -1.], [1., 3.], [-1., 0.], [-2., -3.]])
    target = torch.tensor([[1., 0.], [0., 1.], [1., 1.], [0., 0.]])
    metrics, figures = of(output, target)
    # first label: ranked 1 0 1 0; second: 1 1 0 0, a logit of 0 has the probability 0.5 and is predicted
    assert figures.ap.tolist() == pytest.approx([100 * (1 / 1 + 2 / 3) / 2, 100])
    assert metrics['map'] == pytest.approx((500 / 6 + 100) / 2)
    # all pairs, ranked: 3+ 2+ 1- 0+ -1+ and -1- together, -2- -3-
    assert metrics['micro_map'] == pytest.approx(100 * (1 + 1 + 3 / 4 + 4 / 6) / 4)
    assert (figures.positives.tolist(), figures.hits.tolist(), figures.predicted.tolist()) == ([2, 2], [1, 2], [2, 2])
    assert metrics['micro_precision'] == metrics['micro_recall'] == metrics['micro_f1'] == 75
    assert metrics['macro_f1'] == 75 and figures.column('f1') == [50, 100]
    # exact in the first row and, with no label, in the last; F1 of rows: 1, 2/3, 2/3, and 0 for nothing of nothing
    assert metrics['exact_match'] == 50 and metrics['sample_f1'] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 4)
    assert metrics['loss'] == pytest.approx(F.binary_cross_entropy_with_logits(output.double(), target.double()).item())
    assert (metrics['images'], metrics['empty'], metrics['nonfinite'], metrics['unreadable']) == (4, 1, 0, 0)


@pytest.mark.parametrize('threshold', [0.5, 0.2, 0.73])
def test_equal_to_torchmetrics_and_timm(rows: Rows, threshold: float) -> None:
    output, target = sound(rows)
    metrics, figures = of(output, target, threshold)
    whole, prob = target.long(), output.double().sigmoid()
    below = math.nextafter(threshold, 0)  # torchmetrics predicts what is above, timm and we what reaches the threshold
    for kind, name in ((MultilabelF1Score, 'f1'), (MultilabelPrecision, 'precision'), (MultilabelRecall, 'recall')):
        for average in ('micro', 'macro'):
            expected = kind(LABELS, average=average, threshold=below)(prob, whole).item()
            assert metrics[f'{average}_{name}'] == pytest.approx(100 * expected, abs=1e-4)
        each = kind(LABELS, average=None, threshold=below)(prob, whole)
        assert figures.column(name) == pytest.approx((100 * each).tolist(), abs=1e-4)
    assert metrics['exact_match'] == pytest.approx(
        100 * MultilabelExactMatch(LABELS, threshold=below)(prob, whole).item(), abs=1e-4)
    assert metrics['micro_map'] == pytest.approx(
        100 * MultilabelAveragePrecision(LABELS, average='micro')(prob, whole).item(), abs=1e-4)
    each = MultilabelAveragePrecision(LABELS, average=None)(prob, whole)
    assert figures.ap[:-1].tolist() == pytest.approx((100 * each[:-1]).tolist(), abs=1e-4)
    assert math.isnan(figures.ap[-1]) and metrics['map'] == pytest.approx(100 * each[:-1].mean().item(), abs=1e-4)

    evaluator = MultiLabelClassificationEvaluator(threshold=threshold)
    evaluator.update(output, target)
    theirs = evaluator.compute()
    for name in ('loss', 'micro_f1', 'macro_f1', 'sample_f1'):
        assert metrics[name] == pytest.approx(theirs[name], abs=1e-5)
    assert metrics['map'] * (LABELS - 1) / LABELS == pytest.approx(theirs['map'])  # it counts absent labels as 0


def test_logits_that_are_not_finite_predict_nothing() -> None:
    output = torch.tensor([[math.nan, 5.], [math.inf, -5.], [-math.inf, -5.], [2., -5.]])
    target = torch.tensor([[1., 1.], [1., 0.], [0., 0.], [1., 0.]])
    metrics, figures = of(output, target)
    assert (metrics['images'], metrics['nonfinite'], metrics['empty']) == (4, 3, 1)
    assert (figures.positives.tolist(), figures.predicted.tolist()) == ([3, 1], [1, 0])
    assert figures.ap.tolist() == pytest.approx([100 / 3, 0])  # never retrieved, but to be found
    assert metrics['exact_match'] == 25  # not even the row that has no label is right
    assert metrics['loss'] == pytest.approx(F.binary_cross_entropy_with_logits(output[3:], target[3:]).item(), abs=1e-7)
    # the control: torchmetrics takes infinity for the best score
    assert MultilabelAveragePrecision(2, average=None)(output[1:], target[1:].long())[0] == 1
    assert of(output[1:], target[1:])[1].ap[0] == 50
    only, _ = of(output[:1], target[:1])
    assert only['map'] == 0 and math.isnan(only['loss'])


def test_unreadable_rows_enter_no_figure(rows: Rows) -> None:
    output, target = rows
    metrics, _ = of(output, target)
    assert (metrics['images'], metrics['nonfinite'], metrics['unreadable']) == (298, 2, 2)
    readable = target[:, 0] != UNREADABLE
    assert {**of(output[readable], target[readable])[0], 'unreadable': 2} == metrics
    assert of(output[readable], target[readable])[0] != metrics


def test_no_image() -> None:
    tally = LabelTally(CPU, 3)
    tally.update(torch.zeros(0, 3), torch.zeros(0, 3))
    metrics = tally.compute_over_processes()
    assert metrics['images'] == 0 and all(math.isnan(metrics[key]) for key in ('map', 'loss', 'exact_match'))


def test_soft_labels_are_rounded_except_in_the_loss() -> None:
    output, soft = torch.tensor([[1., -1.]]), torch.tensor([[0.8, 0.3]])
    metrics, _ = of(output, soft)
    hard, _ = of(output, torch.tensor([[1., 0.]]))
    assert metrics['exact_match'] == 100
    assert metrics['loss'] == pytest.approx(F.binary_cross_entropy_with_logits(output, soft).item(), abs=1e-7)
    assert {**metrics, 'loss': 0} == {**hard, 'loss': 0} and metrics != hard


def test_scores_are_ordered_as_numbers() -> None:
    scores = np.array([-0., 0., 1e-45, -1e-45, 3e38, -3e38, 2., -2.], np.float32)
    hits, taken = retrieved(scores, np.array([1, 0, 1, 0, 0, 1, 1, 0], bool))
    assert taken.tolist() == [1, 2, 3, 5, 6, 7, 8] and hits.tolist() == [0, 1, 2, 3, 3, 3, 4]  # -0 is 0
    assert average_precision(hits, taken, 4) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5 + 4 / 8) / 4)


def test_large_losses_neither_overflow_nor_lose_digits() -> None:
    metrics, _ = of(torch.tensor([[-1e6, 0.], [-3e38, 0.]]), torch.tensor([[1., 0.], [1., 1.]]))
    assert metrics['loss'] == pytest.approx((2. ** 40 + 1e6 + 2 * math.log(2)) / 4, abs=1e-3)
    tally = LabelTally(CPU, 2)
    for _ in range(300):
        tally.update(torch.full((1, 2), -0.7), torch.zeros(1, 2))
    assert tally.compute()['loss'] == pytest.approx(math.log(1 + math.exp(-0.7)), abs=1e-8)
    assert int(tally.sums[0, 1]) < 2 ** 40  # the fractions were carried


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_order_and_batches_change_no_digit(rows: Rows, dtype: torch.dtype) -> None:
    output, target = (rows[0] * 1.1).to(dtype), rows[1]
    whole, figures = of(output, target)
    for seed, size in ((0, 1), (1, 7), (2, 64)):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        tally = LabelTally(CPU, LABELS)
        for part in order.split(size):
            tally.update(output[part], target[part])
        other, other_figures = tally.compute_all()
        assert other == whole
        assert np.array_equal(other_figures.ap, figures.ap, equal_nan=True) and np.array_equal(
            other_figures.micro, figures.micro)
    # the control: float sums of the same losses depend on the order
    losses = F.binary_cross_entropy_with_logits(*sound(rows), reduction='none').flatten()
    assert len({np.cumsum(losses[torch.randperm(len(losses))].numpy())[-1] for _ in range(20)}) > 1


def test_figures_are_made_anew_after_more_images(rows: Rows) -> None:
    tally = LabelTally(CPU, LABELS)
    tally.update(rows[0][:100], rows[1][:100])
    first = tally.compute()
    tally.update(rows[0][100:], rows[1][100:])
    assert tally.compute() == of(*rows)[0] != first
    tally.reset()
    tally.update(rows[0][:100], rows[1][:100])
    assert tally.compute() == first


# -- several processes

def measure(output: torch.Tensor, target: torch.Tensor, rank: int = 0, world_size: int = 1, padded: bool = False,
            ) -> str:
    """Everything that is measured, in a form that can be compared."""
    tally = LabelTally(CPU, LABELS, 0.4)
    result = evaluate(
        torch.nn.Identity(), Shares(output, target, rank, world_size, padded), Runtime(CPU, PLAIN, rank, world_size),
        tally=tally, log_interval=1)
    with torch.inference_mode():
        metrics, figures = tally.compute_all()
    assert repr(metrics) == repr(result.metrics)
    parts = (figures.positives, figures.hits, figures.predicted, figures.ap, *figures.micro)
    values = [part.tolist() for part in parts]
    return repr((metrics, values, result.unreadable_positions))


@pytest.mark.parametrize('world_size', [2, 3])
def test_processes_change_no_digit(rows: Rows, tmp_path: Path, world_size: int) -> None:
    check_processes(measure, [(rows[0][:count], rows[1][:count]) for count in (299, 97, 2, 1)], world_size, tmp_path)
