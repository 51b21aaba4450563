"""Metrics against values worked out by hand and by torchmetrics, and over 1, 2 and 3 processes to the last digit."""
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from process_tools import in_processes
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from cpool_vision.engine.data.unreadable import UNREADABLE
from cpool_vision.engine.device import Precision, Runtime
from cpool_vision.engine.validate import metrics as module
from cpool_vision.engine.validate.evaluate import check_views, evaluate
from cpool_vision.engine.validate.metrics import ClassTally, MultiLabelTally, Tally, wilson_interval
from cpool_vision.errors import ConfigError, DatasetError

CPU = torch.device('cpu')
PLAIN = Precision(None, None, 'cpu')
CLASSES = 7


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is the rows."""
    return torch.tensor(rows, dtype=torch.float64).log().float()


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """300 rows of random logits with unreadable and non-finite ones among them."""
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(300, CLASSES, generator=generator) * 3
    target = torch.randint(0, CLASSES, (300,), generator=generator)
    target[[3, 99]] = UNREADABLE
    output[[5, 99, 200], [0, 1, 6]] = torch.tensor([math.nan, math.nan, math.inf])
    return output, target


def of(output: torch.Tensor, target: torch.Tensor) -> tuple[dict[str, float], Any]:
    tally = ClassTally(CPU, output.shape[-1])
    tally.update(output, target)
    return tally.compute_all()


def test_values_by_hand() -> None:
    output = logits_of([.7, .2, .1], [.5, .3, .2], [.1, .6, .3], [.3, .3, .4])
    metrics, figures = of(output, torch.tensor([0, 1, 1, 2]))
    assert metrics['top1'] == 75 and metrics['images'] == 4
    assert metrics['loss'] == pytest.approx(-(math.log(.7) + math.log(.3) + math.log(.6) + math.log(.4)) / 4, abs=1e-7)
    assert metrics['macro_accuracy'] == pytest.approx((100 + 50 + 100) / 3)
    brier = (.09 + .04 + .01) + (.25 + .49 + .04) + (.01 + .16 + .09) + (.09 + .09 + .36)
    assert metrics['brier'] == pytest.approx(brier / 4, abs=1e-7)
    # one image in each of four bins: |1 - .7|, |0 - .5|, |1 - .6|, |1 - .4|
    assert metrics['ece'] == pytest.approx(100 * (.3 + .5 + .4 + .6) / 4, abs=1e-5)
    assert metrics['mce'] == pytest.approx(60, abs=1e-5)
    assert figures.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert figures.accuracy.tolist() == [100, 50, 100]
    assert figures.bin_images[[7, 10]].tolist() == [1, 1] and figures.bin_images.sum() == 4
    assert (metrics['top1_low'], metrics['top1_high']) == pytest.approx((30.0642, 95.4413), abs=1e-3)


@pytest.mark.parametrize('hits, total, low, high', [
    (5, 10, 0.2366, 0.7634), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (1, 1, 0.2065, 1), (81, 263, 0.2553, 0.3662),
])
def test_wilson_interval(hits: int, total: int, low: float, high: float) -> None:
    """The last one is an example of Newcombe (Stat. Med. 17, 1998)."""
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=1e-4)
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))


def test_equal_to_torchmetrics_where_that_is_exact(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    output, target = rows
    good = output.isfinite().all(1) & (target != UNREADABLE)
    metrics, figures = of(output[good], target[good])
    prob = output[good].double().softmax(-1)
    for name, average, k in (('top1', 'micro', 1), ('top5', 'micro', 5), ('macro_accuracy', 'macro', 1)):
        expected = MulticlassAccuracy(CLASSES, average=average, top_k=k)(output[good], target[good])
        assert metrics[name] == pytest.approx(100 * expected.item(), abs=1e-4)
    assert (figures.confusion == MulticlassConfusionMatrix(CLASSES)(output[good], target[good]).numpy()).all()
    for name, norm in (('ece', 'l1'), ('mce', 'max')):
        expected = MulticlassCalibrationError(CLASSES, norm=norm)(prob, target[good])
        assert metrics[name] == pytest.approx(100 * expected.item(), abs=1e-4)
    assert metrics['loss'] == pytest.approx(F.cross_entropy(output[good].double(), target[good]).item(), abs=1e-11)
    brier = (prob - F.one_hot(target[good], CLASSES)).square().sum(1).mean().item()
    assert metrics['brier'] == pytest.approx(brier, abs=1e-11)


def test_certain_predictions_are_in_the_last_bin() -> None:
    _, figures = of(torch.tensor([[100., 0.], [0., 100.]]), torch.tensor([0, 0]))
    assert figures.bin_images[-1] == 2 and figures.bin_hits[-1] == 1 and figures.bin_confidence[-1] == 1


def test_logits_that_are_not_finite_are_never_classed() -> None:
    output = torch.tensor([[math.nan, 0.], [math.inf, 0.], [0., -math.inf], [2., 0.]])
    target = torch.tensor([0, 0, 0, 0])
    metrics, figures = of(output, target)
    assert (metrics['images'], metrics['nonfinite'], metrics['top1']) == (4, 3, 25)
    assert metrics['loss'] == pytest.approx(F.cross_entropy(output[3:], target[3:]).item(), abs=1e-7)
    assert figures.confusion.tolist() == [[1, 0], [0, 0]] and figures.images.tolist() == [4, 0]
    assert figures.bin_images.sum() == 1 and figures.accuracy[0] == 25 and math.isnan(figures.accuracy[1])
    # why MulticlassAccuracy does not do: NaN is its class 0
    assert MulticlassAccuracy(2, average='micro')(output[:1], target[:1]) == 1
    only, _ = of(output[:1], target[:1])
    assert only['top1'] == 0 and math.isnan(only['loss']) and math.isnan(only['ece'])


def test_unreadable_and_unlabelled_rows_enter_no_figure(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    output, target = rows
    metrics, _ = of(output, target)
    assert (metrics['images'], metrics['nonfinite'], metrics['unreadable']) == (298, 2, 2)
    less, _ = of(output[target != UNREADABLE], target[target != UNREADABLE])
    assert {**less, 'unreadable': 2} == metrics
    assert of(output[:3], torch.tensor([0, -1, CLASSES]))[0]['unlabeled'] == 2


def test_no_image_and_few_classes() -> None:
    tally = ClassTally(CPU, 3)
    tally.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    metrics = tally.compute()
    assert metrics['images'] == 0 and all(math.isnan(metrics[key]) for key in ('top1', 'loss', 'ece', 'macro_accuracy'))
    assert of(torch.tensor([[1.]]), torch.tensor([0]))[0]['top5'] == 100


def test_many_classes_have_no_matrix(rows: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'CONFUSION_LIMIT', CLASSES - 1)
    assert of(*rows)[1].confusion is None


def test_large_losses_neither_overflow_nor_lose_digits() -> None:
    output = torch.tensor([[0., 3e38], [0., 1e6], [0., 1.]])
    tally = Tally(CPU)
    tally.update(output[1:], torch.tensor([0, 0]))
    assert tally.compute()['loss'] == pytest.approx((1e6 + math.log(1 + math.e)) / 2, abs=1e-9)
    tally.update(output[:1], torch.tensor([0]))
    assert tally.compute()['loss'] == pytest.approx(2 ** 40 / 3, rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_order_and_batches_change_no_digit(rows: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    output, target = rows[0].to(dtype), rows[1]
    whole, figures = of(output, target)
    for seed, size in ((0, 1), (1, 7), (2, 64)):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        tally = ClassTally(CPU, CLASSES)
        for part in order.split(size):
            tally.update(output[part], target[part])
        other, other_figures = tally.compute_all()
        assert other == whole
        for name, value in vars(figures).items():
            assert np.array_equal(getattr(other_figures, name), value, equal_nan=True)
    # the control: a float sum of the same losses depends on the order
    good = rows[0].isfinite().all(1)
    losses = F.cross_entropy(rows[0][good], rows[1][good].clamp(0), reduction='none')
    assert len({np.cumsum(losses[torch.randperm(len(losses))].numpy())[-1] for _ in range(20)}) > 1


def test_several_right_labels() -> None:
    tally = MultiLabelTally([[1, 2], [], [0], [3], [0]], CPU)
    output = torch.eye(8)[[2, 0, 1, 3, 0]]
    output[3, 7] = math.nan
    tally.update(output[:3], torch.tensor([0, 0, 0]), [0, 1, 2])
    tally.update(output[3:], torch.tensor([0, UNREADABLE]), [3, 4])
    metrics = tally.compute_over_processes()
    assert metrics['images'] == 3 and metrics['top1'] == pytest.approx(100 / 3)


# -- several processes

class Shares:
    """Batches of one process, as timm's ordered distributed sampler makes them."""

    def __init__(self, output: torch.Tensor, target: torch.Tensor, rank: int, world_size: int, padded: bool) -> None:
        count = len(target)
        places = torch.arange(rank, -(-count // world_size) * world_size, world_size) % count
        self.output, self.target = output[places], target[places]
        self.sampler = SimpleNamespace(num_valid_samples=(count + world_size - 1 - rank) // world_size)
        if padded:
            del self.sampler.num_valid_samples

    def __len__(self) -> int:
        return -(-len(self.target) // 16)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.output.split(16), self.target.split(16), strict=True)


def measure(output: torch.Tensor, target: torch.Tensor, rank: int = 0, world_size: int = 1, padded: bool = False,
            ) -> Any:
    """Everything that is measured, in a form that can be compared."""
    tally, several = ClassTally(CPU, CLASSES), MultiLabelTally([[i % CLASSES, 3] for i in range(len(target) + 3)], CPU)
    result = evaluate(
        torch.nn.Identity(), Shares(output, target, rank, world_size, padded), Runtime(CPU, PLAIN, rank, world_size),
        tally=tally, log_interval=1,
        on_batch=several.update)
    with torch.inference_mode():
        metrics, figures = tally.compute_all()
        assert repr(metrics) == repr(result.metrics)
        values = {name: value.tolist() for name, value in vars(figures).items()}
        return repr((metrics, values, several.compute_over_processes(), result.unreadable_positions))


def measure_all(measure: Callable[..., str], cases: list[Any], world_size: int, rank: int) -> tuple[list[str], str]:
    return [measure(*case, rank, world_size) for case in cases], measure(*cases[0], rank, world_size, padded=True)


def check_processes(measure: Callable[..., str], cases: list[Any], world_size: int, folder: Path) -> None:
    """Compares what each of several processes measures with what one does."""
    expected = [measure(*case) for case in cases]
    assert expected[0].endswith('[3, 99])')
    for measured, padded in in_processes(world_size, folder, partial(measure_all, measure, cases, world_size)):
        assert measured == expected
        assert padded != expected[0]  # the control: with the padding counted the figures differ


@pytest.mark.parametrize('world_size', [2, 3])
def test_processes_change_no_digit(rows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, world_size: int) -> None:
    check_processes(measure, [(rows[0][:count], rows[1][:count]) for count in (299, 97, 7, 2, 1)], world_size, tmp_path)


def test_labels_that_are_no_class_are_an_error() -> None:
    with pytest.raises(DatasetError, match='2 images have no label, .* --num-classes'):
        measure(torch.rand(3, CLASSES), torch.tensor([0, -1, CLASSES]))


def test_filled_batches_are_all_of_one_size() -> None:
    class Sized(torch.nn.Module):
        def forward(self, image: Any) -> torch.Tensor:
            sizes.append(len(image['patches'] if isinstance(image, dict) else image))
            return (image['patches'] if isinstance(image, dict) else image) * sizes[-1]

    images, labels = torch.rand(10, CLASSES), torch.zeros(10, dtype=torch.long)
    for fill, expected in ((0, [4, 4, 2]), (4, [4, 4, 4]), (3, [4, 4, 3])):
        for pack in (lambda image: image, lambda image: {'patches': image, 'length': 5}):
            sizes: list[int] = []
            seen: list[torch.Tensor] = []
            loader: Any = [(pack(image), label) for image, label in zip(images.split(4), labels.split(4), strict=True)]
            evaluate(Sized(), loader, Runtime(CPU, PLAIN), fill=fill, on_batch=lambda output, *_: seen.append(output))  # noqa: B023
            assert sizes == expected and [len(output) for output in seen] == [4, 4, 2]
            assert torch.equal(torch.cat(seen), images * 4) == (fill == 4)


def test_mirror_images() -> None:
    images = torch.rand(4, CLASSES, 2, 6)

    class Left(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image[:, :, 0, 0]

    loader: Any = [(images, torch.zeros(4, dtype=torch.long))]
    seen: list[torch.Tensor] = []
    for views in (0, 1, 2):
        evaluate(Left(), loader, Runtime(CPU, PLAIN), views=views, on_batch=lambda output, *_: seen.append(output))
    assert torch.equal(seen[0], images[..., 0, 0]) and torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], (images[..., 0, 0] + images[..., 0, -1]) / 2)
    with pytest.raises(ConfigError, match='--tta 3'):
        check_views(3)
    with pytest.raises(ConfigError, match='--naflex-loader'):
        check_views(2, naflex=True)
