"""The command for CUDA machines, tried on a CPU with small shapes, and the tables that are made of its figures."""
import json

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import operator, steps, tables


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """Figures of one operator's case and of one model's step."""
    patch = pytest.MonkeyPatch()
    patch.setattr(operator, 'OTHERS', ('reference', 'flex_attention', 'depthwise_7x7_other_layout'))
    patch.setattr(steps, 'ARMS', {arm: {**kwargs, 'depth': 1, 'embed_dim': 16, 'num_heads': 2}
                                  for arm, kwargs in steps.ARMS.items()})
    patch.setitem(command._SECONDS, 'compiled', 1e9)
    path = tmp_path_factory.mktemp('gpu') / 'new' / 'figures.json'
    try:
        assert command.main(['-o', str(path), '--tiny', '--device', 'cpu', '--repeats', '1']) == 0
    finally:
        patch.undo()
    return path


def test_every_implementation_has_figures_or_says_why_not(measured):
    rows = {row['implementation']: row for row in json.loads(measured.read_text())['operator']['tiny']}
    assert 'CUDA' in rows['triton']['refused']
    assert rows['reference']['errors']['dsigma'] < 1e-4
    assert 'FlexAttention' in rows['tiny: flex_attention']['failed']
    for name in ('reference', 'depthwise_7x7', 'depthwise_7x7_other_layout'):
        assert rows[name]['kernel_ms'] > 0 and rows[name]['both_ms'] > 0 and rows[name]['floor_ms'] > 0


def test_layers_have_figures(measured):
    rows = json.loads(measured.read_text())['layers']
    assert [row['layer'] for row in rows] == ['tiny tokens', 'tiny maps']
    assert all(row['both_ms'] > 0 and row['kernel_ms'] > row['pool_ms'] == 0 for row in rows)  # no kernels on a CPU


def test_steps_and_what_was_skipped(measured):
    results = json.loads(measured.read_text())
    eager = results['steps']['vit_micro_cpool_patch4_32 eager']
    assert [row['arm'] for row in eager] == ['base', 'variant', 'depthwise_7x7']
    assert all(row['step_ms'] > 0 for row in eager)
    assert len(results['skipped']) == 2 and all('compiled' in what for what in results['skipped'])
    assert results['machine']['torch'] == torch.__version__ and 'commit' in results['machine']


def test_tables_are_written_between_the_markers(measured, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(f'before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n')
    assert tables.main([str(measured), '--write', '--file', str(page)]) == 0
    text = page.read_text()
    assert text.startswith('before\n') and text.endswith('after\n') and 'old' not in text
    assert '| tiny | reference |' in text and '| tiny maps |' in text and 'vit_micro_cpool_patch4_32 eager' in text
    assert '2 measurements were skipped because the time was up' in text
    widths = {line.count('|') for line in text.splitlines() if line.startswith('| tiny |')}
    assert widths == {10}


def test_a_cut_off_keeps_what_was_measured(tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(steps, 'measure', cut)
    monkeypatch.setattr(operator, 'FIRST', ('depthwise_7x7',))
    path = tmp_path / 'figures.json'
    with pytest.raises(KeyboardInterrupt):
        command.main(['-o', str(path), '--tiny', '--device', 'cpu', '--repeats', '1'])
    assert json.loads(path.read_text())['operator']['tiny'][0]['kernel_ms'] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about a machine without CUDA')
def test_a_machine_without_a_device_is_refused_with_the_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(['-o', str(tmp_path / 'figures.json')])
    assert '--tiny --device cpu' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_configurations_that_are_tried(monkeypatch):
    """The shipped one first, all different, and each compiles as asked."""
    configs = pytest.importorskip('benchmarks.gpu.configs')
    from benchmarks.gpu.compile import compile_case
    from benchmarks.kernel_cost import launches
    case = operator.CASES['28x28, 192 channels, 16 groups']
    seen = []
    compiled = launches.Launch
    monkeypatch.setattr(launches, 'Launch', lambda name, grid, args, made: seen.append((name, args)) or compiled(
        name, grid, args, made))
    for kernel in configs.KERNELS:
        tried = configs.candidates(case, kernel)
        assert tried[0] == configs.shipped(case, kernel) and len(set(tried)) == len(tried) > 20
    other = tried[-1]._replace(num_warps=1, tile_h=2)
    assert compile_case(case, kernel, other, 90) == 4
    assert {name: args['TILE_H'] for name, args in seen if name != 'prepare'} == {
        'pool': configs.shipped(case, 'pool').tile_h, 'grad_queries': configs.shipped(case, 'grad_queries').tile_h,
        'grad_keys': 2}
