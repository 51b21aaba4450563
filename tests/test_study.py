"""The study runner: what it reads, runs, repeats and says."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from benchmarks.study import __main__ as command
from benchmarks.study import runner
from benchmarks.study.after import draw_supports, format_sizes
from benchmarks.study.report import format_table, paired_interval, summarize
from benchmarks.study.runner import (
    StaleRunError,
    prepare,
    read_results,
    restore,
    result_file,
    run_missing,
    score_once,
)
from benchmarks.study.spec import read_study

TEXT = '''
title: Tiny
base: plain
flags: {epochs: 1, warmup_epochs: 0, batch_size: 8, workers: 0, input_size: [3, 32, 32], num_classes: 2, lr: 0.01,
        val_interval: 1, recovery_interval: 1}
model: vit_micro_cpool_patch4_32
model_kwargs: {embed_dim: 16, num_heads: 2, depth: 2}
seeds: [0, 1]
arms:
  plain: {model_kwargs: {cpool_positions: []}}
  pool: {flags: {lr: 0.02}}
  once: {seeds: [1], label: three layers, model_kwargs: {depth: 3}}
'''


@pytest.fixture
def study(tmp_path):
    path = tmp_path / 'tiny.yaml'
    path.write_text(TEXT)
    return read_study(path)


def finish(output, name, top1):
    arm, seed = name.split('-s')
    runner.write_text(result_file(output, name), json.dumps(
        dict(arm=arm, seed=int(seed), top1=top1, params=1000, macs=2000)))


def test_arms_inherit_and_seeds_come_first(study):
    assert [(arm.name, seed) for arm, seed in study.runs()] == [
        ('plain', 0), ('pool', 0), ('plain', 1), ('pool', 1), ('once', 1)]
    settings = study.run_settings(study.arms['pool'], 1)
    assert settings['lr'] == 0.02 and settings['seed'] == 1 and settings['epochs'] == 1
    assert study.arms['once'].model_kwargs == {'embed_dim': 16, 'num_heads': 2, 'depth': 3}
    assert study.arms['plain'].base is None and study.arms['pool'].base == 'plain'


@pytest.mark.parametrize('old,new,message', [
    ('title:', 'titel:', "unknown key 'titel' in .*choose from arms"),
    ('base: plain', 'base: plane', "base of arm 'plain' .* must be one of the arms, got 'plane'"),
    ('epochs: 1', 'seed: 1', "'seed' in flags of .* is set by the study itself"),
    ('seeds: [0, 1]', 'seeds: [0, 0]', 'must be a list of distinct integers'),
    ('model: vit_micro_cpool_patch4_32', '', "arm 'plain' .* has no model"),
    ('once: {seeds: [1]', 'once: {seed: [1]', "unknown key 'seed' in arm 'once'"),
    ('once: {', 'once: 3 #', "arm 'once' of .* must be a mapping, got 3"),
])
def test_bad_studies(tmp_path, old, new, message):
    path = tmp_path / 'bad.yaml'
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_study(path)


def test_interval_is_student_s():
    mean, half = paired_interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.302653 / 3 ** .5, rel=1e-5)
    assert paired_interval([1.]) is None


def test_differences_are_paired_by_seed(study, tmp_path):
    for name, top1 in (('plain-s0', 50), ('plain-s1', 60), ('pool-s0', 51), ('pool-s1', 61.1), ('once-s1', 59)):
        finish(tmp_path, name, top1)
    rows = {r['arm']: r for r in summarize(study, read_results(study, tmp_path), {'pool': 1.25})}
    # far apart between seeds, close within: an unpaired test would see nothing
    assert rows['pool']['difference'] == pytest.approx(1.05) and rows['pool']['interval'][1] < 1.05
    assert rows['once']['difference'] == -1 and rows['once']['interval'] is None
    table = format_table(list(rows.values()))
    assert '| pool | 2 | 56.05 ± 7.14 | +1.05 ± 0.64 | 0.001 | 0.0 | 1.25 |' in table
    assert '| three layers (`once`) | 1 | 59.00 | -1.00 (one seed) |' in table
    assert '| plain | 2 | 55.00 ± 7.07 | base |' in table


def test_an_interval_around_zero_is_no_effect(study, tmp_path):
    for name, top1 in (('plain-s0', 50), ('plain-s1', 60), ('pool-s0', 51), ('pool-s1', 59.9)):
        finish(tmp_path, name, top1)
    assert ', no effect |' in format_table(summarize(study, read_results(study, tmp_path), {}))


def test_other_settings_are_refused_and_nothing_is_lost(study, tmp_path):
    assert len(prepare(study, tmp_path / 'out', tmp_path)) == 5
    finish(tmp_path / 'out', 'pool-s0', 1.)
    assert 'pool-s0' not in prepare(study, tmp_path / 'out', tmp_path)
    (tmp_path / 'tiny.yaml').write_text(TEXT.replace('0.02', '0.03'))
    changed = read_study(tmp_path / 'tiny.yaml')
    before = (tmp_path / 'out' / 'configs' / 'pool-s0.yaml').read_bytes()
    with pytest.raises(StaleRunError, match='pool-s0.yaml holds other settings than the study'):
        prepare(changed, tmp_path / 'out', tmp_path)
    assert (tmp_path / 'out' / 'configs' / 'pool-s0.yaml').read_bytes() == before


def test_jobs_run_side_by_side_and_failures_are_named(study, tmp_path, monkeypatch):
    alive, most = set(), []

    def start(output, name, threads):
        alive.add(name)
        most.append(len(alive))
        status = 3 if name == 'pool-s0' else 0
        return subprocess.Popen(  # noqa: S603
            [sys.executable, '-c', f'import time; time.sleep(.3); raise SystemExit({status})'])

    def score(output, name, data_dir):
        alive.discard(name)
        return dict(arm=name.split('-s')[0], seed=int(name[-1]), top1=1., params=1, macs=1)

    monkeypatch.setattr(runner, '_start', start)
    monkeypatch.setattr(runner, 'score', score)
    monkeypatch.setattr(runner, '_POLL_S', .02)
    lines = []
    assert run_missing(study, tmp_path, tmp_path, 2, 1, lines.append) == ['pool-s0']
    assert max(most) >= 2 and any('pool-s0: failed with status 3' in line for line in lines)
    assert len(read_results(study, tmp_path)) == 4
    assert prepare(study, tmp_path, tmp_path) == ['pool-s0']


def test_the_final_split_is_scored_once_and_last(study, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'score', lambda output, name, data_dir, split: {'name': name, 'split': split})
    with pytest.raises(RuntimeError, match="'test' is scored when all runs are done, and plain-s0 is not"):
        score_once(study, tmp_path, tmp_path, 'test')
    for arm, seed in study.runs():
        finish(tmp_path, f'{arm.name}-s{seed}', 1.)
    assert len(score_once(study, tmp_path, tmp_path, 'test')) == 5
    with pytest.raises(RuntimeError, match="'test' was scored before: its figures are in"):
        score_once(study, tmp_path, tmp_path, 'test')


def test_figures_made_elsewhere_are_taken_for_the_same_settings_only(study, tmp_path):
    finish(tmp_path / 'there', 'plain-s0', 50.)
    finish(tmp_path / 'there', 'pool-s0', 51.)
    rows = read_results(study, tmp_path / 'there')
    (tmp_path / 'tiny.yaml').write_text(TEXT.replace('0.02', '0.03'))  # another rate for the arm `pool`
    changed = read_study(tmp_path / 'tiny.yaml')
    assert restore(changed, tmp_path / 'here', [*rows, {'arm': 'gone', 'seed': 0}]) == 1
    assert [row['arm'] for row in read_results(changed, tmp_path / 'here')] == ['plain']
    assert restore(study, tmp_path / 'here', rows) == 1  # and what is there stays
    runner.write_text(result_file(tmp_path / 'copied', 'pool-s0'), json.dumps(rows[1]))
    with pytest.raises(StaleRunError, match='pool-s0.json comes from other settings than the study: use another'):
        read_results(changed, tmp_path / 'copied')
    assert 'plain-s0' not in prepare(study, tmp_path / 'here', tmp_path)


def test_supports_of_the_last_epoch_are_read_and_drawn(study, tmp_path):
    finish(tmp_path, 'plain-s0', 50.)
    finish(tmp_path, 'pool-s0', 51.)
    run = tmp_path / 'runs' / 'pool-s0'
    run.mkdir(parents=True)
    (run / 'supports.csv').write_text(
        'epoch,layer,mean,q05,q50,q95\n0,a,1,1,1,1\n1,a,2,1,2,3\n1,b,4,3,4,6\n')
    rows = read_results(study, tmp_path)
    assert [row['supports'] for row in rows] == [{}, {'a': [2, 1, 2, 3], 'b': [4, 3, 4, 6]}]
    assert draw_supports(study, rows, tmp_path / 'supports.png')
    assert (tmp_path / 'supports.png').read_bytes()[:4] == b'\x89PNG'
    assert not draw_supports(study, rows[:1], tmp_path / 'none.png') and not (tmp_path / 'none.png').exists()


def test_sizes_are_compared_with_the_base_at_the_same_size(study):
    rows = [{'arm': arm, 'seed': seed, 'size': size, 'top1': 40. + size / 8 + seed + gain}
            for arm, gain in (('plain', 0.), ('pool', 2.)) for seed in (0, 1) for size in (48, 32)]
    table = format_sizes(study, rows).splitlines()
    assert table[0] == '| arm | 32 px | 48 px |'
    assert table[2:] == ['| plain | 44.50 | 46.50 |', '| pool | 46.50 (+2.00 ± 0.00) | 48.50 (+2.00 ± 0.00) |']


@pytest.mark.slow
def test_interrupted_and_called_again(tmp_path, capsys, monkeypatch):
    """SIGTERM in the middle of the first training; the second call goes on and reports."""
    for i, split in enumerate(('train', 'validation')):
        for j, name in enumerate(('a', 'b')):
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for k in range(16):
                seed = torch.Generator().manual_seed(100 * i + 50 * j + k)
                noise = torch.randint(0, 256, (32, 32, 3), generator=seed)
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f'{k}.jpg')
    path = tmp_path / 'tiny.yaml'
    text = yaml.safe_load(TEXT)
    text.update(arms={'plain': text['arms']['plain'], 'pool': text['arms']['pool']}, seeds=[0])
    text['flags']['epochs'] = 12
    path.write_text(yaml.safe_dump(text))
    output = tmp_path / 'out'
    arguments = [str(path), '--data-dir', str(tmp_path / 'data'), '-o', str(output)]
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, '-m', 'benchmarks.study', *arguments], cwd=runner.ROOT, stdout=subprocess.PIPE, text=True,
        env=dict(os.environ, PYTHONPATH=str(runner.ROOT)))
    deadline = time.monotonic() + 600
    while not list(output.glob('runs/plain-s0/recovery-*')):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    assert 'interrupted: call again to go on' in process.communicate(timeout=300)[0]
    assert process.returncode == 143 and not result_file(output, 'plain-s0').exists()

    monkeypatch.setattr(sys, 'argv', ['study', *arguments, '--time', '--batch', '2', '--repeats', '1',
                                       '--sizes', '32', '48', '--results', str(tmp_path / 'results.json')])
    assert command.main() == 0
    monkeypatch.setattr(sys, 'argv', ['study', *arguments, '--final-split', 'train', '--results',
                                       str(tmp_path / 'results.json')])
    assert command.main() == 0
    with pytest.raises(SystemExit, match="'train' was scored before: its figures are in .*results.json"):
        command.main()
    out = capsys.readouterr().out
    assert '\ntrain\n' in out
    assert '| pool | 1 |' in out and '(one seed)' in out
    assert '| arm | 32 px | 48 px |' in out
    kept = json.loads((tmp_path / 'results.json').read_text())
    assert [row['top1'] for row in kept['sizes'] if row['size'] == 32] == [row['top1'] for row in kept['runs']]
    assert all(row['machine']['commit'] for part in ('runs', 'sizes') for row in kept[part])
    assert kept['timing']['ratios']['plain'] == 1. and kept['timing']['machine'] == kept['runs'][0]['machine']
    assert [row['images'] for row in kept['final']['train']] == [row['images'] for row in kept['runs']] == [32, 32]
    epochs = (output / 'runs' / 'plain-s0' / 'summary.csv').read_text().splitlines()
    assert len(epochs) == 13
    assert (output / 'study.png').read_bytes()[:4] == b'\x89PNG' and Path(output / 'table.md').exists()
    assert (output / 'logs' / 'plain-s0.log').read_text().count('Run folder') == 2  # and no epoch was repeated
