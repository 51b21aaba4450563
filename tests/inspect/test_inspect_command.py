import json
import pathlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cpool_vision.cli import inspect as cli
from tests.inspect.test_report import browse, check_page, pixels_of

SMALL = ['--num-images', '2', '--dpi', '40', '--rf-probes', '1']


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Runs the command, which must succeed, and returns the files that it names."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.split()


def test_everything_of_a_model(tmp_path: pathlib.Path, capsys) -> None:
    names = ['sheet.png', 'feet.pdf', 'depth.svg', 'field.png', 'numbers.json', 'report.html']
    paths = [tmp_path / name for name in names]
    flags = ['-o', '--footprints', '--depth', '--receptive-field', '--json', '--html']
    outputs = [each for pair in zip(flags, paths, strict=True) for each in pair]
    torch.manual_seed(0)
    assert run(capsys, 'vit_micro_cpool_patch4_32', *outputs, *SMALL, '--points', 1, 2, 30, 31) == list(map(str, paths))
    assert all(np.asarray(Image.open(path)).std() > 5 for path in paths if path.suffix == '.png')
    assert paths[1].read_bytes().startswith(b'%PDF') and b'<svg' in paths[2].read_bytes()
    numbers = json.loads(paths[4].read_text(encoding='utf-8'))
    assert [each['layer'] for each in numbers['layers']] == [f'blocks.{i}.cpool_attn' for i in range(6)]
    assert numbers['image_size'] == [32, 32] and len(numbers['images']) == 2 and numbers['checkpoint'] is None
    for each in numbers['layers']:
        assert each['grid'] == [8, 8] and each['cell_px'] == 4 and 0 < each['effective_pixels'] <= 1
        assert each['limits_px'][0] < each['q05_px'] <= each['q50_px'] <= each['q95_px'] < each['limits_px'][1]
        assert sum(numbers['histogram']['shares'][each['layer']]) == pytest.approx(1)
    feet = numbers['footprints']
    first = feet['layers']['blocks.0.cpool_attn']
    assert feet['points_px'] == [[1, 2], [30, 31]] and first['cells'] == [[0, 0], [7, 7]]
    assert np.shape(first['sigma_px']) == (2, 8, 2)  # images, groups, points
    field = numbers['receptive_field']
    assert field['unit'] == [4, 4] and field['grid'] == [8, 8] and field['layer'] is None
    assert all(4 < value < 28 for value in field['pools_off']['center_px'])
    assert 0 < field['pools_off']['radius_50_px'] < field['pools_off']['radius_90_px'] < 32
    page = check_page(paths[5].read_text(encoding='utf-8'))
    assert len(page.images) == 5
    for text in ('Context pools of vit_micro_cpool_patch4_32', 'blocks.4.cpool_attn', f'{numbers["parameters"]:,}',
                 f'{numbers["layers"][0]["mean_px"]:.3g}', f'{field["pools_off"]["radius_90_px"]:.4g}', 'random'):
        assert text in page.text


def test_options_may_stand_before_the_images(tmp_path: pathlib.Path, capsys) -> None:
    photo = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photo)
    common = ['local-dir:models/resnet_micro_cpool_32.cifar10', str(photo), '--dpi', '40']
    run(capsys, common[0], '-o', tmp_path / 'a.png', *common[1:])
    run(capsys, *common, '-o', tmp_path / 'b.png')
    assert np.array_equal(Image.open(tmp_path / 'a.png'), Image.open(tmp_path / 'b.png'))


def test_receptive_field_of_a_layer_and_point(tmp_path: pathlib.Path, capsys) -> None:
    path = tmp_path / 'n.json'
    for layer, grid in (('0', [32, 32]), ('layer2', [16, 16])):
        run(capsys, 'resnet_micro_cpool_32', '--json', path, *SMALL, '--num-images', '1', f'--rf-layer={layer}',
            '--rf-point', 0, 31)
        field = json.loads(path.read_text(encoding='utf-8'))['receptive_field']
        assert field['grid'] == grid and field['unit'] == [0, grid[1] - 1]


def test_pools_of_windows_have_depths_but_no_sheet(tmp_path: pathlib.Path, capsys) -> None:
    model = ['swin_micro_cpool_patch2_window4_32', '--model-kwargs', 'cpool_positions=window', 'cpool_stages=[0,1]']
    path = tmp_path / 'report.html'
    run(capsys, *model, *SMALL, '--num-images', 1, '--html', path)
    assert len(check_page(path.read_text(encoding='utf-8')).images) == 2
    assert cli.main([*model, *SMALL, '-o', str(tmp_path / 'sheet.png')]) == 2
    assert 'pools windows only' in capsys.readouterr().err


SUMMARY = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2.5,2.25,20,60,0.01\n1,1.5,1.75,45.5,80,0.005\n' \
    '2,1.25,1.875,44,81,0.001\n'
SUPPORTS = 'epoch,layer,mean,q05,q50,q95\n0,blocks.0.cpool,1,0.5,1,1.5\n2,blocks.0.cpool,1.75,0.5,1.625,2.5\n'


@pytest.fixture
def run_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / 'my <run>'
    folder.mkdir()
    (folder / 'summary.csv').write_text(SUMMARY)
    (folder / 'supports.csv').write_text(SUPPORTS)
    (folder / 'args.yaml').write_text('model: vit_micro_cpool_patch4_32\nlr: 0.0123\nseed: 42\neval_metric: top1\n')
    return folder


def test_report_of_a_run(run_folder: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    path = tmp_path / 'run.html'
    assert run(capsys, '--run', run_folder, '--html', path, '--dpi', 50) == [str(path)]
    page = check_page(path.read_text(encoding='utf-8'))
    assert len(page.images) == 1
    for text in ('Run my <run>', 'Best by eval_top1: after 2 of 3 epochs', '45.5', '44', '1.625', '2.5', '0.0123',
                 'All 4 settings'):
        assert text in page.text
    # a default is listed once, a setting that differs twice
    rows = [line for line in path.read_text(encoding='utf-8').splitlines() if line.startswith('<tr>')]
    assert [sum(f'>{name}<' in row for row in rows) for name in ('lr', 'seed')] == [3, 1]  # lr is in the metrics too


def test_chromium_shows_the_report_of_a_run(run_folder: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    path = tmp_path / 'run.html'
    run(capsys, '--run', run_folder, '--html', path)
    shown = browse(path, height=1400)
    assert pixels_of(shown, (31, 119, 180)) > 100  # the curves
    assert pixels_of(shown, (0, 89, 168)) > 10  # the line that opens all settings, at the end of the page


def test_report_of_a_run_with_its_model(run_folder: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    (run_folder / 'supports.csv').unlink()
    (run_folder / 'args.yaml').unlink()
    path = tmp_path / 'run.html'
    run(capsys, 'resnet_micro_cpool_32', '--run', run_folder, '--html', path, *SMALL, '--num-images', 1, '--layers', 1)
    page = check_page(path.read_text(encoding='utf-8'))
    assert len(page.images) == 6 and 'Supports at the end' not in page.text and 'Settings' not in page.text


@pytest.mark.parametrize('arguments, message', [
    (['resnet_micro_cpool_32'], 'nothing to write: give one of --output, --groups, --footprints'),
    (['--html', 'OUT.html'], '--html needs a MODEL'),
    (['--run', 'RUN', '-o', 'OUT.png'], "--run 'RUN' needs --html FILE"),
    (['--run', 'RUN', '--html', 'OUT.html', '--json', 'OUT.json'], '--json needs a MODEL'),
    (['--run', 'RUN', '--html', 'OUT.html'], "'RUN' is not a folder"),
    (['resnet_micro_cpool_32', '--depth', 'OUT.xyz'], 'its suffix must be one of'),
    (['resnet_micro_cpool_32', '--html', 'none/OUT.html'], "--html 'none/OUT.html' cannot be written"),
    (['resnet_micro_cpool_32', '--depth', 'OUT.png', '--dpi', '0'], '--dpi must be >= 1, got 0'),
    (['resnet_micro_cpool_32', '--footprints', 'OUT.png', '--points', '1', '2', '3'], 'pairs Y X, got 3 numbers'),
    (['resnet_micro_cpool_32', '--footprints', 'OUT.png', '--points', '1', '32'], '(1.0, 32.0) is not inside an image'),
    (['resnet_micro_cpool_32', '--json', 'OUT.json', '--rf-layer', 'no'], "no layer 'no': name a module"),
    (['resnet_micro_cpool_32', '--json', 'OUT.json', '--rf-probes', '0'], 'probes must be >= 1, got 0'),
    (['resnet_micro_cpool_32', '--footprints', 'OUT.png', '--layers', 'x'], "no context pool is named 'x'"),
    (['test_resnet', '--depth', 'OUT.png'], 'has no context pool'),
])
def test_bad_requests_in_one_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, '--num-images', '1']) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and '\n' not in error
    assert list(tmp_path.iterdir()) == []


def test_images_behind_the_keywords_of_the_model(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(['resnet_micro_cpool_32', '--model-kwargs', 'cpool_groups=2', 'x.png', '-o', str(tmp_path / 'a.png')])
    assert stop.value.code == 2
    assert "--model-kwargs takes KEY=VALUE, got 'x.png': put it before the flag" in capsys.readouterr().err


@pytest.mark.parametrize('name, content, message', [
    ('args.yaml', 'a: [', 'args.yaml.* cannot be read'),
    ('args.yaml', 'text', 'must contain settings, got str'),
    ('summary.csv', 'epoch,eval_top1\n0,much\n', 'is not a table of a run'),
])
def test_damaged_runs(name, content, message, run_folder, tmp_path, capsys) -> None:
    (run_folder / name).write_text(content)
    former = tmp_path / 'run.html'
    former.write_text('mine')
    assert cli.main(['--run', str(run_folder), '--html', str(former)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert former.read_text() == 'mine'
