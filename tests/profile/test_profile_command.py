import ast
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cpool_vision.ops import BACKENDS
from cpool_vision.profile import __main__ as command
from cpool_vision.profile import floor, implementations, report
from cpool_vision.profile.plot import cost_figure

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ['--shape', '1', '4', '8', '8', '--sigma', '0.3', '1', '--repeats', '3']
ROW = re.compile(r'^\| (\w+) \| (.*) \|$', re.MULTILINE)


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('_RATE_SECONDS', 0.001), ('_MIN_RATE_RUNS', 2), ('_GEMM_SIDE', {'cpu': 64, 'cuda': 64})):
        monkeypatch.setattr(floor, name, value)
    monkeypatch.setattr(floor, 'gemm_rate', floor.gemm_rate.__wrapped__)


def able() -> set[str]:
    case = command._case(command.build_parser().parse_args(TINY))
    return {name for name, reason in report.availability(case, implementations.NAMES).items() if reason is None}


@pytest.mark.parametrize('backward', [False, True])
def test_table_and_json_agree(backward: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'new' / 'figures.json'
    assert command.main([*TINY, '--json', str(path), *(['--backward'] if backward else [])]) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found['case']['shape'] == [1, 4, 8, 8] and found['case']['mean_support'] == pytest.approx(0.65)
    assert ('forward + backward, 1x4x8x8 float32' in printed) == backward == found['case']['backward']
    rows = {row['implementation']: row for row in found['rows']}
    assert set(rows) == able() and {'reference', 'tiled', 'sdpa_augmented', 'depthwise_7x7'} <= set(rows)
    shown = dict(ROW.findall(printed))
    for name, row in rows.items():
        assert 0 < row['p20_ms'] <= row['median_ms'] <= row['p80_ms'] and row['runs'] == 3
        assert row['ratio_to_dense'] == pytest.approx(rows['reference']['median_ms'] / row['median_ms'])
        assert row['cost_over_depthwise_7x7'] == pytest.approx(row['median_ms'] / rows['depthwise_7x7']['median_ms'])
        assert row['peak_memory_per_x'] >= (1 if not backward else 2)
        cells = shown[name].split(' | ')
        assert cells[0] == f'{row["median_ms"]:.3f}' and cells[3] == f'{row["peak_memory_per_x"]:.1f}'
        if name == 'depthwise_7x7':
            assert row['times_floor'] is None and cells[5] == '-'
        else:
            assert row['times_floor'] == pytest.approx(row['median_ms'] / found['floor']['ms'])
    assert f'floor {found["floor"]["ms"]:.3g} ms, set by {found["floor"]["bound"]}' in printed
    assert torch.__version__ in printed and found['machine']['torch'] == torch.__version__
    assert found['machine']['cpu'] in printed and found['machine']['device'] == 'cpu'
    assert found['refused'].keys() == set(BACKENDS) - able() and found['sweeps'] == {}


def test_dry_run_gives_reasons_and_measures_nothing(tmp_path, capsys, monkeypatch) -> None:
    def never(*_, **__):
        raise AssertionError('measured')

    for name in ('times_in_turn', 'peak_memory', 'floor'):
        monkeypatch.setattr(report, name, never)
    monkeypatch.setattr(implementations, 'free_memory', lambda device: 1000)
    path = tmp_path / 'f.json'
    assert command.main([*TINY, '--dry-run', '--json', str(path), '--plot', str(tmp_path / 'x.png')]) == 0
    rows = dict(ROW.findall(capsys.readouterr().out))
    assert rows['tiled'].startswith('yes') and rows['depthwise_7x7'].startswith('yes')
    assert rows['reference'].startswith('no | all pairs take about')
    available = json.loads(path.read_text())['available']
    assert list(available) == list(implementations.NAMES) and available['tiled'] is None and available['reference']
    assert not (tmp_path / 'x.png').exists()
    with pytest.raises(AssertionError, match='measured'):
        command.main(TINY)


def test_named_backends_run_beside_the_baselines(capsys, monkeypatch) -> None:
    assert report.chosen_names(['tiled']) == ['reference', 'tiled', 'sdpa_augmented', 'depthwise_7x7']
    assert report.chosen_names(['all']) == list(implementations.NAMES)
    monkeypatch.setattr(report, 'peak_memory', lambda *_: 1.0)
    assert command.main([*TINY, '--backend', 'reference']) == 0
    shown = dict(ROW.findall(capsys.readouterr().out))
    assert list(shown)[1:] == ['reference', 'sdpa_augmented', 'depthwise_7x7']
    reasons = {name: None if name == 'reference' else 'it is closed' for name in BACKENDS}
    monkeypatch.setattr(implementations, 'available_backends', lambda *_: reasons)
    assert command.main([*TINY, '--backend', 'tiled']) == 2
    assert 'error: --backend tiled cannot run: it is closed; drop it' in capsys.readouterr().err
    assert command.main([*TINY, '--backend', 'all']) == 0
    printed = capsys.readouterr().out
    assert 'not run: tiled: it is closed' in printed and 'tiled' not in dict(ROW.findall(printed))


def test_without_the_dense_reference_there_is_no_ratio(capsys, monkeypatch) -> None:
    monkeypatch.setattr(implementations, 'free_memory', lambda device: 1000)
    assert command.main([*TINY, '--backend', 'tiled']) == 0
    assert dict(ROW.findall(capsys.readouterr().out))['tiled'].split(' | ')[4] == '-'


def test_plot_and_sweeps(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, path = tmp_path / 'cost.png', tmp_path / 'f.json'
    flags = ['--sides', '6', '4', '--supports', '1', '0.5', '--plot', str(picture), '--json', str(path)]
    assert command.main([*TINY, *flags, '--backend', 'tiled', '--smooth']) == 0
    image = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert('L'))
    assert image.shape[1] > 600 and image.std() > 5
    sweeps = json.loads(path.read_text())['sweeps']
    assert [point['at'] for point in sweeps['size']] == [4, 6]
    assert [point['case']['shape'] for point in sweeps['size']] == [[1, 4, 4, 4], [1, 4, 6, 6]]
    assert [point['case']['mean_support'] for point in sweeps['support']] == pytest.approx([0.5, 1])
    printed = capsys.readouterr().out
    assert re.search(r'^\| map side \| reference \| tiled \|', printed, re.MULTILINE)
    assert re.search(r'^\| 0.5 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| 1.00 \|', printed, re.MULTILINE)


def test_one_sweep_without_a_plot(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*TINY, '--sweep', 'support', '--supports', '0.5', '--backend', 'tiled']) == 0
    printed = capsys.readouterr().out
    assert '| mean support, px |' in printed and '| map side |' not in printed


def fake_points(costs: dict[float, dict[str, float]]) -> list[dict]:
    case = {'sigma': [0.2, 2.0], 'shape': [4, 96, 56, 56]}
    return [{'at': at, 'case': case, 'floor': {'ms': 0.5}, 'rows': [
        {'implementation': name, 'median_ms': 2 * cost, 'cost_over_depthwise_7x7': cost}
        for name, cost in row.items()]} for at, row in costs.items()]


def test_figure_shows_costs_over_the_convolution() -> None:
    sizes = fake_points({7: {'reference': 3.0, 'tiled': 2.0, 'depthwise_7x7': 1.0},
                         14: {'tiled': 4.0, 'depthwise_7x7': 1.0}})
    figure = cost_figure({'size': sizes, 'support': fake_points({0.5: {'tiled': 2.5, 'depthwise_7x7': 1.0}})}, 'title')
    left, right = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines['tiled'] == [[7, 2], [14, 4]] and lines['reference'] == [[7, 3]]
    assert lines['floor'] == [[7, 0.25], [14, 0.25]] and 'depthwise_7x7' not in lines
    assert left.get_xscale() == left.get_yscale() == 'log'
    assert 'reference' not in {line.get_label() for line in right.lines}
    assert left.get_xlabel() == 'side of the map (pixels)' and right.get_xlabel() == 'mean support (pixels)'
    assert '56x56 maps' in right.get_title() and '0.2 to 2 px' in left.get_title()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        'reference', 'tiled', 'floor', 'depthwise 7x7 convolution']


def test_figures_that_cannot_be_written_are_one_line(tmp_path, capsys, monkeypatch) -> None:
    def full(figure: object, path: str) -> None:
        raise OSError('disk full')

    monkeypatch.setattr('cpool_vision.inspect.canvas.save_figure', full)
    flags = ['--sides', '4', '--supports', '1', '--backend', 'tiled', '--plot', str(tmp_path / 'x.png')]
    assert command.main([*TINY, *flags]) == 2
    assert 'error: results cannot be written (disk full)' in capsys.readouterr().err


def test_without_matplotlib(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert command.main([*TINY, '--plot', str(tmp_path / 'x.png')]) == 2
    assert capsys.readouterr().err == "error: --plot: drawing needs matplotlib: pip install 'cpool_vision[plot]'\n"


@pytest.mark.parametrize('flags, message', [
    (['--shape', '1', '0', '8', '8'], '--shape must be four numbers B C H W of at least 1, got 1 0 8 8'),
    (['--sigma', '0', '1'], '--sigma must be MIN MAX with 0 < MIN <= MAX, got 0 1'),
    (['--sigma', '2', '1'], 'got 2 1'),
    (['--sigma', 'nan', '1'], 'got nan 1'),
    (['--groups', '3'], '--groups must divide the 4 channels of --shape, got 3'),
    (['--stride', '0'], '--stride must be >= 1, got 0'),
    (['--dtype', 'int8'], "--dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
    (['--device', 'abacus'], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
    (['--device', 'meta'], "--device must be cpu, cuda or cuda:N, got 'meta'"),
    (['--device', 'cuda:99'], 'CUDA devices; use --device cpu'),
    (['--backend', 'dense'], f"--backend must be all or some of {', '.join(BACKENDS)}, got 'dense'"),
    (['--repeats', '0'], '--repeats must be >= 1, got 0'),
    (['--sides', '7', '0'], '--sides must be >= 1, got 0'),
    (['--supports', '0'], '--supports must be > 0, got 0'),
    (['--plot', 'cost.xyz'], "cannot draw to 'cost.xyz': its suffix must be one of"),
    (['--json', '/dev/null/f.json'], "--json '/dev/null/f.json' cannot be written"),
    (['--json', '/'], "--json '/' cannot be written: choose a file"),
])
def test_bad_input_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*TINY, *flags]) == 2
    out, error = capsys.readouterr()
    assert error.startswith('error: ') and message in error and error.count('\n') == 1 and '|' not in out


def test_package_runs_as_a_module_and_as_a_script() -> None:
    line = re.search(r'^cpool-profile = "(.*):(.*)"$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    assert line and line.groups() == (command.__name__, command.main.__name__)
    result = subprocess.run(  # noqa: S603
        [sys.executable, '-m', 'cpool_vision.profile', *TINY, '--dry-run'], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=False)
    assert result.returncode == 0, result.stderr
    assert dict(ROW.findall(result.stdout))['tiled'].startswith('yes')


def test_profiler_stands_on_the_operator_and_on_shared_helpers() -> None:
    reached = set()
    for path in (ROOT / 'cpool_vision' / 'profile').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('cpool_vision.'):
                reached.add(node.module.split('.')[1])
    assert 'ops' in reached and reached <= {'ops', 'engine', 'errors', 'inspect', 'cli', 'version'}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_on_a_gpu(dtype: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'f.json'
    flags = ['--device', 'cuda', '--backward', '--dtype', dtype, '--channels-last', '--json', str(path)]
    assert command.main(['--shape', '2', '64', '28', '28', *flags]) == 0
    found = json.loads(path.read_text())
    assert {'reference', 'tiled', 'sdpa_augmented', 'depthwise_7x7'} <= {r['implementation'] for r in found['rows']}
    assert all(row['peak_memory_per_x'] > 1 and row['median_ms'] > 0 for row in found['rows'])
    assert found['machine']['gpu'] and found['floor']['copy_bytes_per_s'] > 1e11
