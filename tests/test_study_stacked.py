"""Stacked studies: a stack equals its nets, interruptions change nothing, scores are what they say."""
import contextlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.study.report import contrast, format_contrasts
from benchmarks.study.spec import Arm, read_study
from benchmarks.study.stacked import __main__ as command
from benchmarks.study.stacked import shifts
from benchmarks.study.stacked.nets import build_net, run_stack
from benchmarks.study.stacked.probes import EXCHANGES, exchange_maps, format_probes, pools_of, radius_correlations
from benchmarks.study.stacked.runs import load_net, recipe_of
from benchmarks.study.stacked.score import score_stack
from benchmarks.study.stacked.tasks import Recipe, Split, augment, load_split, normalize
from benchmarks.study.stacked.train import Stack, epoch_order, learning_rate, stack_loss, train

CPU = torch.device('cpu')
STUDIES = Path(__file__).parents[1] / 'benchmarks' / 'studies'
TEXT = '''
title: Tiny
flags: {task: shapes-seg, image_size: 32, train_samples: 24, selection_samples: 8, test_samples: 8, epochs: 2,
        batch_size: 8, lr: 0.01}
model: vit_micro_cpool_patch4_32
model_kwargs: {embed_dim: 16, depth: 1, num_heads: 2, cpool_groups: 4}
base: plain
seeds: [0, 1]
contrasts: [[pool, plain]]
arms: {plain: {model_kwargs: {cpool_positions: []}}, pool: {}}
'''
DENSE = Recipe(task='shapes-seg', image_size=32, train_samples=24, selection_samples=8, test_samples=8, epochs=2,
               batch_size=8, lr=0.01)
ARMS = {
    'plain': {'cpool_positions': []},
    'predicted': {'cpool_groups': 4},
    'tiled': {'cpool_groups': 4, 'cpool_backend': 'tiled'},
    'reference': {'cpool_groups': 4, 'cpool_backend': 'reference'},
    'constant': {'cpool_groups': 2, 'cpool_mixer': 'fixed'},
    'depthwise7': {'cpool_mixer': 'depthwise7'},
}


def make_arm(name='predicted', **kwargs):
    sizes = dict(embed_dim=16, depth=1, num_heads=2)
    return Arm(name, 'vit_micro_cpool_patch4_32', {**sizes, **ARMS[name], **kwargs}, {}, (0, 1, 2), None)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


@pytest.mark.parametrize('name', ARMS)
def test_a_stack_is_its_nets_one_by_one(name, cache):
    split = load_split(DENSE, 'train', cache)
    together = Stack(make_arm(name), DENSE, [0, 1, 2], CPU)
    index, draws = epoch_order([0, 1, 2], 0, 24, 8)
    losses = torch.stack([together.step(split, index[:, i], draws[:, i], 0.01) for i in range(3)])
    for s in range(3):
        alone = Stack(make_arm(name), DENSE, [s], CPU)
        index, draws = epoch_order([s], 0, 24, 8)
        for i in range(3):
            loss = alone.step(split, index[:, i], draws[:, i], 0.01)
            torch.testing.assert_close(loss[0], losses[i, s], atol=2e-5, rtol=2e-4)
    assert losses[0, 0] != losses[0, 1]


def test_a_stack_s_forward_is_that_of_the_zoo_s_model():
    recipe = Recipe(task='cifar10', train_samples=64)
    arm = make_arm()
    nets = [build_net(arm, recipe, s) for s in (0, 1)]
    stack = Stack(arm, recipe, [0, 1], CPU)
    images = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        outputs = run_stack(stack.net, stack.parameters, images)
        for net, image, output in zip(nets, images, outputs, strict=True):
            torch.testing.assert_close(net(image), output, atol=1e-5, rtol=1e-4)
        shown_to_all = run_stack(stack.net, stack.parameters, images[0])
    torch.testing.assert_close(shown_to_all[0], outputs[0], atol=1e-5, rtol=1e-4)


def test_arms_start_from_the_same_weights():
    recipe = Recipe(task='cifar10', train_samples=64)
    plain, pool, other = (
        build_net(make_arm(name), recipe, seed).state_dict()
        for name, seed in (('plain', 3), ('predicted', 3), ('plain', 4)))
    assert len(pool) > len(plain) and all(torch.equal(pool[k], v) for k, v in plain.items())
    assert not torch.equal(plain['patch_embed.proj.weight'], other['patch_embed.proj.weight'])


def test_batches_depend_on_seed_and_epoch_alone():
    order, draws = epoch_order([0, 1], 0, 20, 6)
    assert order.shape == (2, 3, 6) and draws.shape == (2, 3, 6, 3)
    assert torch.equal(epoch_order([1], 0, 20, 6)[0][0], order[1])
    assert not torch.equal(order[0], order[1]) and not torch.equal(epoch_order([0], 1, 20, 6)[0][0], order[0])
    assert len(set(order[0].flatten().tolist())) == 18


def test_an_interrupted_training_ends_as_if_it_had_not_been(cache, tmp_path):
    split = load_split(DENSE, 'train', cache)
    whole = Stack(make_arm(), DENSE, [0, 1], CPU)
    train(whole, split, tmp_path / 'whole.pt', lambda _: None)

    def stop(line):
        raise KeyboardInterrupt
    first = Stack(make_arm(), DENSE, [0, 1], CPU)
    with pytest.raises(KeyboardInterrupt):
        train(first, split, tmp_path / 'parts.pt', stop)
    lines = []
    second = Stack(make_arm(), DENSE, [0, 1], CPU)
    train(second, split, tmp_path / 'parts.pt', lines.append)
    assert len(lines) == 1 and 'epoch 2' in lines[0]
    for name, value in whole.parameters.items():
        assert torch.equal(value, second.parameters[name]), name


def test_clipping_and_loss_keep_nets_apart(cache):
    outputs = torch.randn(2, 4, 7, 8, 8)
    targets = torch.randint(7, (2, 4, 8, 8))
    both = stack_loss(outputs, targets, DENSE)
    for s in range(2):
        alone = torch.nn.functional.cross_entropy(outputs[s], targets[s])
        torch.testing.assert_close(both[s], alone)
    ignoring = stack_loss(outputs, targets, Recipe(task='shapes-seg', ground_weight=0.))
    objects = torch.nn.functional.cross_entropy(outputs[0], targets[0], ignore_index=0)
    torch.testing.assert_close(ignoring[0], objects)


def test_learning_rate_rises_and_falls():
    recipe = Recipe(lr=1., warmup=0.1)
    rates = [learning_rate(recipe, i, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1 and rates[-1] < 0.02
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_dense_augmentation_moves_masks_with_images():
    mask = torch.randint(7, (5, 8, 8), dtype=torch.uint8)
    images = mask[:, None].expand(-1, 3, -1, -1)
    draws = torch.randint(9, (5, 3))
    draws[:2, 2] = torch.tensor([0, 1])
    moved, targets = augment(images, mask, draws, dense=True)
    assert torch.equal(moved[:, 0], targets)
    assert torch.equal(targets[0], mask[0].flip(1)) and torch.equal(targets[1], mask[1])


def test_shifts_mirror_at_the_border():
    images = torch.arange(8, dtype=torch.uint8).expand(1, 3, 8, 8)
    moved, _ = augment(images, torch.zeros(1), torch.tensor([[4, 6, 1]]), dense=False)
    assert moved[0, 0, 0].tolist() == [2, 3, 4, 5, 6, 7, 6, 5]


def test_dense_scores():
    targets = torch.zeros(2, 32, 32, dtype=torch.uint8)
    radii = torch.zeros(2, 32, 32)
    targets[0, :4], radii[0, :4] = 1, 2.  # 128 pixels of a small object, 4 / 64 of the side
    targets[1, :8], radii[1, :8] = 2, 10.  # 256 pixels of a large one
    split = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), targets, radii)
    outputs = torch.nn.functional.one_hot(targets.long(), 7).permute(0, 3, 1, 2).float() * 9
    outputs[1, :, :4] = torch.tensor([0., 9, 0, 0, 0, 0, 0])[:, None, None]  # half of the large object misnamed
    outputs[0, :, 4:8] = torch.tensor([0., 9, 0, 0, 0, 0, 0])[:, None, None]  # as much ground taken for a small one
    row, = score_stack(lambda x: outputs[None], 1, DENSE, split)
    assert row['foreground_iou'] == pytest.approx(100 * 384 / 512)
    assert row['foreground_iou_small'] == pytest.approx(100 * 128 / 256)
    assert row['foreground_iou_large'] == pytest.approx(100 * 256 / 384)
    assert row['object_accuracy'] == pytest.approx(100 * 256 / 384)
    assert row['object_accuracy_small'] == 100 and row['object_accuracy_large'] == 50
    assert row['miou'] == pytest.approx(100 * (128 / 384 + 128 / 256) / 2)


def test_classification_scores():
    split = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 2, 3]))
    outputs = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]), 10).float()
    rows = score_stack(lambda x: outputs, 2, Recipe(), split)
    assert [row['top1'] for row in rows] == [100, 50]


def test_folders_give_first_images_to_training_and_last_to_selection(tmp_path):
    for split, count in (('train', 4), ('validation', 2)):
        for label, name in enumerate('abcdefghij'):
            folder = tmp_path / 'set' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (32, 32), (100 * (split == 'validation') + 10 * label, i, 0)).save(folder / f'{i}.png')
    recipe = Recipe(train_samples=20, selection_samples=10, test_samples=20, batch_size=4)
    splits = {s: load_split(recipe, s, tmp_path / 'cache', tmp_path / 'set') for s in ('train', 'selection', 'test')}
    assert splits['train'].images[:, 1, 0, 0].tolist() == [0, 1] * 10
    assert splits['selection'].images[:, 1, 0, 0].tolist() == [3] * 10
    assert splits['test'].images[:, 0, 0, 0].tolist() == [100 + 10 * (i // 2) for i in range(20)]
    assert splits['train'].targets.tolist() == [i // 2 for i in range(20)]
    assert torch.equal(load_split(recipe, 'train', tmp_path / 'cache').images, splits['train'].images)
    assert normalize(splits['train'].images).dtype == torch.float32


def test_command_runs_repeats_nothing_and_scores_test_images_once(tmp_path, capsys):
    path, out, results = tmp_path / 'tiny.yaml', tmp_path / 'out', tmp_path / 'results.json'
    path.write_text(TEXT)
    call = [str(path), '-o', str(out), '--results', str(results)]
    assert command.main([*call, '--stack', '2', '--only', 'plain']) == 0
    assert '2 of 4 runs' in capsys.readouterr().out
    assert command.main([*call, '--test', '--time', '--plot', str(tmp_path / 'plot.png')]) == 0
    text = capsys.readouterr().out
    assert 'plain-s0' not in text and 'pool-s1: foreground_iou' in text and '| pool minus plain | 2 |' in text
    kept = json.loads(results.read_text())
    assert len(kept['runs']) == len(kept['final']['test']) == 4 and set(kept['timing']['ratios']) == {'plain', 'pool'}
    assert kept['runs'][0]['params'] < kept['runs'][1]['params'] and not list((out / 'states').iterdir())
    with pytest.raises(SystemExit, match='scored before'):
        command.main([*call, '--test'])
    assert command.main([str(path), '-o', str(tmp_path / 'elsewhere'), '--results', str(results), '--report']) == 0
    assert '4 of 4 runs' in capsys.readouterr().out
    page = tmp_path / 'page.md'
    page.write_text('<!-- study tiny contrasts --><!-- /study tiny contrasts -->')
    assert command.main([*call, '--report', '--write', str(page)]) == 0 and '| pool minus plain |' in page.read_text()
    page.write_text('nothing')
    with pytest.raises(SystemExit, match='no markers <!-- study tiny -->'):
        command.main([*call, '--report', '--write', str(page)])


def test_a_step_that_is_not_captured_trains_all_the_same(cache, monkeypatch, capsys):
    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    def refuse(graph):
        raise RuntimeError('operation not permitted when stream is capturing')
    for name, fake in (('Stream', Stream), ('stream', contextlib.nullcontext), ('current_stream', Stream),
                       ('CUDAGraph', object), ('graph', refuse)):
        monkeypatch.setattr(torch.cuda, name, fake)
    split = load_split(DENSE, 'train', cache)
    index, draws = epoch_order([0, 1], 0, 24, 4)
    plain, captured = (Stack(make_arm(), DENSE, [0, 1], CPU) for _ in range(2))
    captured.advance = captured.graph_step
    for group in captured.optimizer.param_groups:
        group['lr'] = torch.tensor(0.)
    for i in range(6):
        loss = plain.step(split, index[:, i], draws[:, i], 0.01 * (i + 1))
        torch.testing.assert_close(captured.advance(split, index[:, i], draws[:, i], 0.01 * (i + 1)), loss)
    assert not captured.graphed and capsys.readouterr().out.count('training goes on without') == 1


def test_contrasts_are_paired(tmp_path):
    path = tmp_path / 'tiny.yaml'
    path.write_text(TEXT)
    study = read_study(path)
    rows = [dict(arm=a, seed=s, foreground_iou=v) for a, s, v in (
        ('plain', 0, 10.), ('plain', 1, 20.), ('pool', 0, 11.), ('pool', 1, 21.2), ('pool', 2, 50.))]
    pairs, interval = contrast(rows, 'pool', 'plain', 'foreground_iou')
    assert pairs == 2 and interval[0] == pytest.approx(1.1)
    assert '| pool minus plain | 2 | +1.10 ± 1.27, no effect |' in format_contrasts(study, rows, 'foreground_iou')
    path.write_text(TEXT.replace('[[pool, plain]]', '[[pool, pain]]'))
    with pytest.raises(ValueError, match="contrasts of .* must be pairs of arms, got .'pool', 'pain'."):
        read_study(path)


@pytest.mark.parametrize('flags, message', [
    ({'task': 'mnist'}, "task must be one of .* got 'mnist'"),
    ({'sed': 1}, "unknown flag 'sed' of a stacked study"),
    ({'train_samples': 10}, 'train_samples must be at least batch_size, got 10 and 64'),
])
def test_bad_recipes(flags, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of({'model': 'x', **flags})


def test_images_from_a_folder_need_one(tmp_path):
    with pytest.raises(ValueError, match="'cifar10' needs --data-dir"):
        load_split(Recipe(), 'train', tmp_path)


def test_images_from_an_archive_are_those_of_its_folder(tmp_path):
    for name in ('a', 'b'):
        folder = tmp_path / 'set' / 'train' / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (32, 32), (80 * i, 10 * ord(name) % 256, 0)).save(folder / f'{i}.png')
    with tarfile.open(tmp_path / 'set.tar.xz', 'w:xz') as archive:
        archive.add(tmp_path / 'set', 'set')
    recipe = Recipe(train_samples=4, selection_samples=2, batch_size=2)
    for split in ('train', 'selection'):
        one, other = (
            load_split(recipe, split, tmp_path / f'cache {place}', tmp_path / place) for place in ('set', 'set.tar.xz'))
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


def test_a_failing_arm_leaves_the_others_and_their_figures(tmp_path, monkeypatch):
    file = tmp_path / 'tiny.yaml'
    file.write_text(TEXT, encoding='utf-8')
    run = command.run_stack_of

    def fail(study, arm, *args):
        if arm.name == 'plain':
            raise RuntimeError('no memory')
        kept = tmp_path / 'r.json'
        assert not kept.exists() or json.loads(kept.read_text())
        run(study, arm, *args)
    monkeypatch.setattr(command, 'run_stack_of', fail)
    assert command.main([str(file), '-o', str(tmp_path / 'out'), '--stack', '2', '--results', str(tmp_path / 'r.json'),
                         '--test']) == 1
    kept = json.loads((tmp_path / 'r.json').read_text())
    assert [row['arm'] for row in kept['runs']] == ['pool', 'pool'] and kept['final'] == {}


def test_weights_of_a_run_give_its_scores_again(tmp_path):
    file, cache = tmp_path / 'tiny.yaml', tmp_path / 'out'
    file.write_text(TEXT.replace('pool: {}', 'pool: {}, selective: {model_kwargs: {cpool_mixer: selective}}'))
    assert command.main([str(file), '-o', str(cache)]) == 0
    study = read_study(file)
    for name in ('pool', 'selective'):
        arm = study.arms[name]
        recipe = recipe_of(study, arm)
        net = load_net(study, cache, arm, 1, CPU)
        split = load_split(recipe, 'selection', cache / 'data')
        row, = score_stack(lambda x, net=net: net(normalize(x))[None], 1, recipe, split)
        kept = json.loads((cache / 'results' / f'{name}-s1.json').read_text())
        assert row['foreground_iou'] == kept['foreground_iou']
    assert pools_of(load_net(study, cache, study.arms['pool'], 0, CPU))[0].bound == 8
    with pytest.raises(ValueError, match='train one at a time'):
        Stack(study.arms['selective'], recipe, [0, 1], CPU)


def test_shifts_of_finished_runs(tmp_path, capsys):
    file, out, results = tmp_path / 'tiny.yaml', tmp_path / 'out', tmp_path / 'results.json'
    file.write_text(TEXT.replace('epochs: 2', 'epochs: 1'))
    assert shifts.main([str(file), '-o', str(out)]) == 1
    assert command.main([str(file), '-o', str(out), '--results', str(results)]) == 0
    assert shifts.main([str(file), '-o', str(out), '--results', str(results)]) == 0
    kept = json.loads(results.read_text())
    scores = {(row['arm'], row['seed'], row['shift']): row['foreground_iou'] for row in kept['shifts']}
    for row in kept['runs']:
        assert scores[row['arm'], row['seed'], 'as trained'] == row['foreground_iou']
    sizes = {name: load_split(shift.of(DENSE), 'selection', out / 'data') for name, shift in shifts.SHIFTS.items()}
    cover = {name: float((split.targets > 0).float().mean()) for name, split in sizes.items()}
    assert cover['objects half as large'] < cover['as trained'] / 2 < 2 * cover['as trained'] < cover[
        'objects twice as large']
    assert sizes['images at twice the size'].images.shape[-1] == 64
    assert cover['images at twice the size'] == pytest.approx(cover['as trained'], rel=.1)
    assert not any(arm == 'plain' and 'kept' in shift for arm, _, shift in scores)
    study = read_study(file)
    state = load_file(out / 'weights' / 'pool-s0.safetensors')
    for shift, ratio in ((shifts.Shift(image=2.), 0.25), (shifts.Shift(image=2., keep_supports=True), 0.125)):
        net = shifts.shifted_net(study.arms['pool'], DENSE, shift, state)
        pool, = pools_of(net)
        assert pool.ratio == ratio


def test_arms_of_unequal_size_are_refused(tmp_path):
    file = tmp_path / 'tiny.yaml'
    file.write_text(TEXT + 'equal_parameters: [plain, pool]\n', encoding='utf-8')
    with pytest.raises(ValueError, match=r"must agree within 2%, got \{'plain': \d+, 'pool': \d+\}"):
        command.main([str(file), '-o', str(tmp_path / 'out')])
    file.write_text(TEXT + 'equal_parameters: [pools]\n', encoding='utf-8')
    with pytest.raises(ValueError, match="equal_parameters of .* must be arms, got 'pools'"):
        read_study(file)


@pytest.mark.parametrize('name', ['dose_response', 'dose_response_gpu', 'forms_gpu', 'mixer_gpu'])
def test_arms_of_committed_studies_stack(name):
    study = read_study(STUDIES / f'{name}.yaml')
    seen = set()
    for arm in study.arms.values():
        recipe = recipe_of(study, arm)
        if (key := repr(arm.model_kwargs)) in seen:
            continue
        seen.add(key)
        stack = Stack(arm, recipe, [0, 1], CPU)
        images = torch.randint(256, (2, 2, 3, recipe.image_size, recipe.image_size), dtype=torch.uint8)
        outputs = stack.outputs(images)
        assert outputs.shape[:3] == (2, 2, recipe.num_classes) and outputs.isfinite().all()


def test_exchanged_parts_are_undone_and_change_what_they_should(cache):
    split = load_split(DENSE, 'selection', cache)
    images = normalize(split.images)
    scores = {}
    for name in ('predicted', 'constant'):
        net = build_net(make_arm(name, cpool_ratio=0.5), DENSE, 0).eval()
        with torch.no_grad():
            for pool in pools_of(net):  # a fresh predictor says next to nothing
                pool.predict.weight.normal_()
                pool.reduce.weight.normal_()
            plain = net(images)
            for what, exchange in EXCHANGES.items():
                undo = exchange_maps(net, exchange)
                scores[name, what] = (net(images) - plain).abs().max().item()
                undo()
            assert torch.equal(net(images), plain)
    assert scores['predicted', 'none'] == scores['constant', 'none'] == 0
    assert scores['constant', 'supports of another image'] == 0
    assert scores['constant', 'weights of another image'] > 1e-4
    assert all(scores['predicted', what] > 1e-4 for what in EXCHANGES if what != 'none')


def test_correlation_with_the_radius(cache, monkeypatch):
    split = load_split(DENSE, 'selection', cache)
    net = build_net(make_arm(), DENSE, 0).eval()
    pool, = pools_of(net)
    radii = split.radii[:, 2::4, 2::4].float()
    predict = pool.read_maps

    def follow(*args):
        weights, sigma = predict(*args)
        return weights, (1 + radii[:, None]).expand_as(sigma)
    with monkeypatch.context() as patch:
        patch.setattr(type(pool), 'read_maps', lambda self, *args: follow(*args))
        assert radius_correlations(net, split) == [pytest.approx(1, abs=1e-3)]
    assert abs(radius_correlations(net, split)[0]) < 0.9
    assert radius_correlations(build_net(make_arm('constant'), DENSE, 0).eval(), split) == [None]
    row = dict(arm='predicted16', none=50., correlations=[None, 0.5], **{k: 40. for k in EXCHANGES if k != 'none'})
    rows = [dict(row, seed=0), {**row, 'seed': 1, 'mean supports': 49.}]
    text = format_probes(read_study(STUDIES / 'mixer.yaml'), rows)
    assert '| 16 groups, predicted supports | 2 | 50.00 | -10.00 ± 0.00 | -5.50 ± 57.18, no effect |' in text
    assert text.endswith('| -10.00 ± 0.00 | -, +0.50 |')
