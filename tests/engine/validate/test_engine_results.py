"""Files that validate.py writes, what a model costs, and validation over two processes."""
import builtins
import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from process_tools import in_processes
from torch.nn.functional import cross_entropy

from cpool_vision.cli.validate import main
from cpool_vision.engine.validate.bulk import run_validation
from cpool_vision.engine.validate.cost import count_macs
from cpool_vision.engine.validate.evaluate import fill_batch
from cpool_vision.engine.validate.metrics import ClassFigures
from cpool_vision.engine.validate.results import finite, write_results
from cpool_vision.engine.validate.results_plots import draw_plots
from cpool_vision.errors import ConfigError, OutputError


@pytest.fixture
def base(image_root: str, tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    path = str(tmp_path / 'weights.pth')
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return ['--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0',
            '-b', '4', '--device', 'cpu', '--checkpoint', path]


@pytest.fixture
def run(validate_args: Callable[..., Any], base: list[str]) -> Callable[..., Any]:
    return lambda *flags: run_validation(validate_args(*base, *flags))


def test_json_holds_everything(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / 'r.json'
    row = run('--results-file', str(path))
    saved = json.loads(path.read_text())
    assert saved == finite(row)
    assert saved['environment']['versions']['torch'] == torch.__version__ and saved['environment']['batch_size'] == 4
    assert saved['environment']['dtype'] == 'float32'
    assert run('--amp', '--amp-dtype', 'bfloat16')['environment']['dtype'] == 'bfloat16 by autocast'
    assert [each['name'] for each in saved['per_class']] == ['cat', 'dog', 'owl']
    assert np.sum(saved['confusion_matrix']) == 7 == sum(each['images'] for each in saved['reliability'])
    assert np.sum(saved['confusion_matrix'], axis=1).tolist() == [3, 3, 1]
    assert saved['top1_low'] < saved['top1'] < saved['top1_high']
    wrong = sum(each['images'] for each in saved['top_confusions'])
    assert wrong == 7 - round(7 * saved['top1'] / 100)


def test_csv_begins_with_the_columns_of_timm(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / 'r.csv'
    row = run('--results-file', str(path), '--results-format', 'csv')
    with open(path, newline='', encoding='utf-8') as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:9] == ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size',
                                  'crop_pct', 'interpolation']
    assert len(lines) == 1 and float(lines[0]['brier']) == row['brier']
    assert not any('[' in value for value in lines[0].values())


def test_markdown_tables(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / 'r.md'
    row = run('--results-file', str(path))
    text = path.read_text()
    assert f'| test_resnet | 7 | {row["top1"]:.2f} ({row["top1_low"]:.2f} to {row["top1_high"]:.2f}) |' in text
    assert '### Least accurate of 3 classes' in text and '| owl | 1 |' in text and '### Calibration' in text
    for block in text.split('\n\n'):
        if block.startswith('|'):
            assert len({line.count('|') for line in block.splitlines()}) == 1
    write_results(str(path), [{'model': 'a|b', 'top1': 1., 'nll': math.nan}, {'model': 'c'}], 'md')
    assert '| a\\|b | - | 1.00 | - | - | - |' in path.read_text()


def test_suffix_wins_over_the_default_format(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / 'r.txt'
    run('--results-file', str(path), '--results-format', 'md')
    assert path.read_text().startswith('## Validation')


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / 'r.json'
    write_results(str(path), {'model': 'm', 'nll': math.nan, 'list': [{'x': math.inf}]}, 'json')
    assert json.loads(path.read_text()) == {'model': 'm', 'nll': None, 'list': [{'x': None}]}


@pytest.mark.parametrize('top_k', [0, 2, 9])
def test_predictions_agree_with_the_figures(run: Callable[..., Any], tmp_path: Path, top_k: int) -> None:
    path = tmp_path / 'p.npz'
    row = run('--predictions', str(path), '--predictions-topk', str(top_k))
    with np.load(path, allow_pickle=False) as saved:
        arrays = dict(saved)
    assert arrays['filename'].tolist() == [*(f'cat/{i}.png' for i in range(3)), *(f'dog/{i}.png' for i in range(3)),
                                           'owl/0.png']
    assert arrays['target'].tolist() == [0, 0, 0, 1, 1, 1, 2] and arrays['class_name'].tolist() == ['cat', 'dog', 'owl']
    if top_k:
        assert arrays['topk_index'].shape == arrays['topk_prob'].shape == (7, min(top_k, 3))
        guess = arrays['topk_index'][:, 0]
    else:
        guess = arrays['logits'].argmax(1)
        logits = torch.from_numpy(arrays['logits'])
        assert row['nll'] == pytest.approx(cross_entropy(logits, torch.from_numpy(arrays['target'])).item(), abs=1e-6)
    assert row['top1'] == pytest.approx(100 * (guess == arrays['target']).mean(), abs=1e-4)
    assert arrays['confusion_matrix'].tolist() == row['confusion_matrix']


def test_bad_paths_are_told_before_the_work(run: Callable[..., Any], base: list[str], tmp_path: Path,
                                            validate_args: Callable[..., Any]) -> None:
    for flags, error, words in (
            (['--predictions', 'p.csv'], ConfigError, 'suffix must be .npz'),
            (['--predictions', '/none/p.npz'], OutputError, '--predictions'),
            (['--predictions-topk', '-1'], ConfigError, '--predictions-topk must be >= 0'),
            (['--plots', '/dev/null/x'], OutputError, '--plots'),
            (['--results-file', str(tmp_path)], OutputError, '--results-file')):
        with pytest.raises(error, match=words):
            run(*flags, '--data-dir', '/none/such')
    (tmp_path / 'many').mkdir()
    for number in range(2):
        shutil.copy(tmp_path / 'weights.pth', tmp_path / 'many' / f'{number}.pth')
    for flag, value in (('--predictions', 'p.npz'), ('--plots', 'x')):
        with pytest.raises(ConfigError, match=f'{flag} works with one model, not 2'):
            run('--checkpoint', str(tmp_path / 'many'), flag, value)


def test_plots_are_pictures(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    run('--plots', str(tmp_path / 'new' / 'plots'))
    for name in ('confusion_matrix', 'reliability', 'per_class'):
        image = np.asarray(Image.open(tmp_path / 'new' / 'plots' / f'{name}.png').convert('L'))
        assert min(image.shape) > 200 and image.std() > 10


@pytest.mark.parametrize('classes, images', [(60, 3), (3, 0)])
def test_plots_of_many_classes_and_of_no_image(tmp_path: Path, classes: int, images: int) -> None:
    pytest.importorskip('matplotlib')
    ones = np.full(classes, images)
    bins = np.zeros(15, np.int64)
    figures = ClassFigures(ones, ones // 2, ones, np.diag(ones), bins, bins, np.full(15, np.nan))
    assert len(draw_plots(str(tmp_path), figures, [str(index) for index in range(classes)], 1.)) == 3
    figures.confusion = None
    assert len(draw_plots(str(tmp_path), figures, [str(index) for index in range(classes)], 1.)) == 2


def test_plots_without_matplotlib(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', refuse)
    with pytest.raises(ConfigError, match=r"--plots needs matplotlib: pip install 'cpool_vision\[plot\]'"):
        run('--plots', str(tmp_path / 'plots'))


def test_cost_on_request(run: Callable[..., Any], tmp_path: Path) -> None:
    assert 'cost' not in run()
    cost = run('--measure-cost', '--results-file', str(tmp_path / 'r.json'))['cost']
    assert cost == json.loads((tmp_path / 'r.json').read_text())['cost']
    assert cost['parameters'] == sum(value.numel() for value in timm.create_model(
        'test_resnet', num_classes=3).parameters())
    assert 0 < cost['latency_p50_ms'] <= cost['latency_p90_ms'] <= cost['latency_p99_ms']
    assert cost['throughput'] > 0 and cost['batch_size'] == 4 and cost['peak_process_memory_mib'] > 50


def test_macs_by_hand() -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5))
    assert count_macs(layers, torch.zeros(1, 3, 4, 4)) == 16 * 8 * 27 + 128 * 5
    model = timm.create_model('test_vit', num_classes=3)
    fused = [module.fused_attn for module in model.modules() if hasattr(module, 'fused_attn')]
    dim, tokens, size = 64, 101, model.pretrained_cfg['input_size'][-1]
    macs = count_macs(model, torch.zeros(1, 3, size, size))
    linear = sum(module.weight.numel() for block in model.blocks for module in block.modules()
                 if isinstance(module, torch.nn.Linear))
    attention = len(model.blocks) * 2 * tokens * tokens * dim
    assert macs == (tokens - 1) * model.patch_embed.proj.weight.numel() + tokens * linear + attention + 3 * dim
    assert fused == [module.fused_attn for module in model.modules() if hasattr(module, 'fused_attn')]


def test_the_command_prints_single_figures(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(base) == 0
    shown = json.loads(capsys.readouterr().out.split('--result\n')[1])
    assert shown['images'] == 7 and 'per_class' not in shown and 'brier' in shown


def validate(command: list[str], rank: int) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger('cpool_vision')
    logger.addHandler(logging.StreamHandler(err))
    logger.setLevel(logging.INFO)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command)
    return status, out.getvalue(), err.getvalue()


def test_two_processes_give_the_results_of_one(run: Callable[..., Any], base: list[str], tmp_path: Path) -> None:
    """Seven images, one of them unreadable, with every output at once."""
    import shutil
    root = tmp_path / 'images'
    shutil.copytree(base[1], root)
    (root / 'validation' / 'dog' / '1.png').write_bytes(b'garbage')
    (tmp_path / 'real.json').write_text(json.dumps({f'{index}.png': [index] for index in range(3)}))
    flags = ['--data-dir', str(root), '--max-bad-samples', '1', '--metrics-avg', 'macro', '--real-labels',
             str(tmp_path / 'real.json')]
    one = run(*flags, '--predictions', str(tmp_path / 'one.npz'))
    command = [*base, *flags, '--predictions', str(tmp_path / 'two.npz'), '--results-file', str(tmp_path / 'two.json'),
               '--measure-cost']

    done = in_processes(2, tmp_path, partial(validate, command), group=False)
    assert [status for status, *_ in done] == [0, 0], done
    assert ''.join(out for _, out, _ in done).count('--result') == 1
    assert '1 of 7 images cannot be read: dog/1.png' in ''.join(err for *_, err in done)
    two = json.loads((tmp_path / 'two.json').read_text())
    assert two.pop('cost')['macs'] > 0
    assert two.pop('images_per_sec') > 0 < one.pop('images_per_sec')
    assert two == finite(one)
    first, second = np.load(tmp_path / 'one.npz'), np.load(tmp_path / 'two.npz')
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


class Streamed(torch.utils.data.IterableDataset):
    dataset = property(lambda self: self)

    def __iter__(self) -> Any:
        raise NotImplementedError


def test_several_processes_refuse_what_cannot_be_exact(validate_args: Callable[..., Any], base: list[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    from cpool_vision.engine.device import Precision, Runtime
    from cpool_vision.engine.validate import bulk
    from cpool_vision.engine.validate import run as validate_run
    args = validate_args(*base, '--retry')
    two = Runtime(torch.device('cpu'), Precision(None, None, 'cpu'), 0, 2)
    with pytest.raises(ConfigError, match='--retry works in one process'):
        bulk._check(args, None, two)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ConfigError, match='--num-gpu 2 splits batches within one process'):
        validate_run.validate(dataclasses.replace(args, num_gpu=2), two)
    monkeypatch.setattr(validate_run, 'build_eval_loader', lambda *_, **__: Streamed())
    with pytest.raises(ConfigError, match='several processes would count images of a streamed dataset twice'):
        validate_run.validate(args, two)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'resnet_micro_cpool_32', 'vit_micro_cpool_patch4_32',
                                  'convnext_micro_cpool_32'])
def test_logits_do_not_depend_on_the_batch(name: str) -> None:
    import cpool_vision  # noqa: F401 - registers the variants
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    side = model.pretrained_cfg['input_size'][-1]
    images = torch.randn(24, 3, side, side)
    with torch.inference_mode():
        whole = model(images)
        for _ in range(3):
            part = torch.randperm(24)[:9]
            assert torch.equal(model(fill_batch(images[part], 24))[:9], whole[part])
