"""Patch sequences of timm's NaFlex loader: effects of the flags, positions, training and validation."""
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loader_tools import unreadable_images
from timm.models import create_model

from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.data import naflex
from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.device import Precision, Runtime
from cpool_vision.engine.tracking.support_log import keep_first_input, measure_supports
from cpool_vision.errors import ConfigError, DatasetError

INPUT = {'input_size': (3, 32, 32), 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4), 'interpolation': 'bilinear',
         'crop_pct': 1.0}
CPU = torch.device('cpu')
PLAIN = Precision(None, None, 'cpu')
KWARGS: dict[str, Any] = dict(embed_dim=16, depth=1, num_heads=2, patch_size=8)
FLAGS = ['--naflex-loader', '--model', 'naflexvit_base_patch16_gap', '--num-classes', '3', '-b', '4', '-j', '0',
         '--naflex-train-seq-lens', '4', '9', '--naflex-max-seq-len', '16']
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def tiny() -> Any:
    torch.manual_seed(0)
    return create_model('naflexvit_base_patch16_gap', num_classes=3, **KWARGS)


@pytest.fixture
def build(image_root: str, train_args: Callable[..., Any]) -> Callable[..., Any]:
    def make(*flags: str, rank: int = 0, world_size: int = 1) -> Any:
        args = train_args('--data-dir', image_root, *FLAGS, *flags)
        common = (args, Runtime(CPU, PLAIN, rank, world_size), INPUT, Classes(3), tiny())
        loader = naflex.build_naflex_train_loader(*common)
        return loader, naflex.build_naflex_eval_loader(
            *common, args.val_split, args.validation_batch_size or args.batch_size, None) if args.val_split else None
    return make


def take(loader: Any, epoch: int = 0, batch: int = 0) -> list[Batch]:
    loader.loader.start_at(epoch, batch)
    return [({key: value.clone() for key, value in patches.items() if isinstance(value, torch.Tensor)}, target.clone())
            for patches, target in loader]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(b, d) and a.keys() == c.keys() and all(torch.equal(a[key], c[key]) for key in a)
        for (a, b), (c, d) in zip(one, two, strict=True))


def test_batches_of_an_epoch(build: Callable[..., Any]) -> None:
    loader, _ = build()
    batches = take(loader)
    lengths = {patches['patches'].shape[1] for patches, _ in batches}
    assert lengths == {4, 9}
    assert sum(len(target) for _, target in batches) == 24
    for patches, target in batches:
        assert patches['patches'].shape[2] == 8 * 8 * 3 and len(patches['patches']) == len(target)
        assert len(target) <= 4 * 9 // patches['patches'].shape[1]
    assert not same(batches, take(loader, 1))


@pytest.mark.parametrize('flags', [
    ['--reprob', '0.8'],
    ['--mixup', '0.4', '--cutmix', '1', '-j', '2'],
], ids=['erasing', 'workers'])
def test_a_position_gives_the_rest_of_the_epoch(build: Callable[..., Any], flags: list[str]) -> None:
    whole = take(build(*flags)[0], 1)
    torch.manual_seed(7)
    assert same(take(build(*flags)[0], 1, 2), whole[2:])
    assert not same(take(build(*flags, '--seed', '5')[0], 1), whole)


def test_two_processes_see_each_image_once(build: Callable[..., Any]) -> None:
    parts = [build('--val-split', '', rank=rank, world_size=2)[0] for rank in (0, 1)]
    counts = [[len(target) for _, target in take(part)] for part in parts]
    assert [sum(count) for count in counts] == [12, 12] and len(counts[0]) == len(counts[1])


@pytest.mark.parametrize('flags, shapes', [
    (['--naflex-train-seq-lens', '16'], {(16, 192)}),
    (['--naflex-patch-sizes', '4', '8', '--naflex-patch-size-probs', '1', '0'], {(4, 4, 4, 3), (9, 4, 4, 3)}),
    (['--naflex-patch-sizes', '4', '8', '--naflex-patch-size-probs', '0', '1'], {(4, 8, 8, 3), (9, 8, 8, 3)})])
def test_lengths_and_sizes_of_patches(
        build: Callable[..., Any], flags: list[str], shapes: set[tuple[int, ...]]) -> None:
    assert {tuple(patches['patches'].shape[1:]) for patches, _ in take(build(*flags)[0])} == shapes


WHOLE = ['--no-aug', '--naflex-train-seq-lens', '9', '--smoothing', '0', '-b', '8']


def test_channels_first(build: Callable[..., Any]) -> None:
    (last, _), *_ = take(build(*WHOLE)[0])
    (first, _), *_ = take(build(*WHOLE, '--naflex-patchify-channels-first')[0])
    valid = last['patch_valid']
    assert torch.equal(first['patches'][valid].unflatten(-1, (3, 64)).mT.flatten(-2), last['patches'][valid])


def test_augmentation_of_patches(build: Callable[..., Any]) -> None:
    plain, again = (take(build(*WHOLE)[0], epoch) for epoch in (0, 1))
    pixels = sorted(float(each.sum()) for batch, _ in plain for each in batch['patches'])
    assert sorted(float(each.sum()) for batch, _ in again for each in batch['patches']) == pytest.approx(pixels)
    whole, erased = (torch.cat([batch['patches'] for batch, _ in take(build(
        '--naflex-train-seq-lens', '9', '--reprob', rate)[0])]) for rate in ('0', '1'))
    changed = (whole != erased).any(-1).float().mean(1)
    assert 0 < changed.mean() < 0.5 and changed.max() < 1
    mixing = build(*WHOLE, '--mixup', '1', '--mixup-off-epoch', '1')[0]
    mixed, later = take(mixing), take(mixing, 1)
    assert any(((target > 0) & (target < 1)).any() for _, target in mixed)
    assert same([(batch, target.argmax(1)) for batch, target in later], again)


def test_validation_sees_each_image_at_the_length_asked_for(build: Callable[..., Any]) -> None:
    for length in (4, 16):
        _, loader = build('--naflex-max-seq-len', str(length), '--validation-batch-size', '5')
        batches = list(loader)
        assert [len(target) for _, target in batches] == [5, 2]
        assert all(patches['patches'].shape[1] == length for patches, _ in batches)
    assert build('--val-split', '')[1] is None


@pytest.mark.parametrize('flags, words', [
    (['--no-prefetcher'], '--no-prefetcher'),
    (['--channels-last'], '--channels-last'),
    (['--train-img-sizes', '32'], '--train-img-sizes'),
    (['--aug-splits', '3'], '--aug-splits'),
    (['--kd-model-name', 'test_vit'], '--kd-model-name'),
    (['--mixup', '1', '--mixup-mode', 'elem'], '--mixup-mode'),
    (['--naflex-patch-size-probs', '1'], '--naflex-patch-size-probs'),
    (['--naflex-max-seq-len', '0'], '--naflex-max-seq-len'),
    (['--torchscript'], '--torchscript'),
    (['--use-multi-epochs-loader'], '--use-multi-epochs-loader'),
])
def test_flags_that_do_not_fit(build: Callable[..., Any], flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(*flags)


@pytest.mark.parametrize('name', ['test_vit', 'vit_micro_cpool_patch4_32'])
def test_models_of_whole_images_are_refused(train_args: Callable[..., Any], name: str) -> None:
    with torch.device('meta'):
        model = create_model(name)
    with pytest.raises(ConfigError, match='takes whole images.*naflexvit'):
        naflex.check_naflex(train_args(*FLAGS, '--model', name), model)


@pytest.mark.parametrize('scale, expected', [('none', 1.), ('sqrt', 1.5), ('linear', 2.25)])
def test_loss_scale(train_args: Callable[..., Any], scale: str, expected: float) -> None:
    args = train_args(*FLAGS, '--naflex-loss-scale', scale)
    assert naflex.naflex_loss_scale(args, Runtime(CPU, PLAIN), 9) == pytest.approx(expected)
    assert train_args().naflex_loss_scale == 'linear'


def test_batches_train_a_model(build: Callable[..., Any]) -> None:
    loader, eval_loader = build()
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    means = []
    for epoch in range(4):
        losses = []
        for patches, target in (loader.loader.start_at(epoch), loader)[1]:
            loss = torch.nn.functional.cross_entropy(model(patches), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    assert means[-1] < means[0]
    assert all(torch.isfinite(model(patches)).all() for patches, _ in eval_loader)


@pytest.mark.parametrize('channels_last', [True, False])
def test_supports_are_measured_on_images_of_one_size(channels_last: bool) -> None:
    model = create_model('naflexvit_micro_cpool_patch4_gap', depth=2, patchify_channels_last=channels_last).eval()
    images = [torch.randn(3, height, width) for height, width in ((8, 12), (12, 8), (8, 12))]
    patches, coord, valid = torch.full((3, 7, 48), 9.), torch.zeros(3, 7, 2).long(), torch.zeros(3, 7).bool()
    for i, image in enumerate(images):
        for j in range(6):
            row, column = divmod(j, image.shape[2] // 4)
            patch = image[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
            patches[i, j] = (patch.permute(1, 2, 0) if channels_last else patch).flatten()
            coord[i, j], valid[i, j] = torch.tensor([row, column]), True
    batch = dict(patches=patches, patch_coord=coord, patch_valid=valid)
    with keep_first_input(model) as kept:
        output = model(batch)
    assert torch.equal(kept[0], torch.stack(images[::2]))
    torch.testing.assert_close(model(kept[0]), output[::2], rtol=1e-4, atol=1e-5)
    assert [each.layer for each in measure_supports(model, kept[0], PLAIN)] == [
        'blocks.0.cpool_attn', 'blocks.1.cpool_attn']
    with keep_first_input(model) as kept:
        model(dict(batch, patch_valid=valid & (torch.arange(7) != 2)))
    assert kept == []


RUN = ['--model-kwargs', 'embed_dim=16', 'depth=2', 'num_heads=2', 'patch_size=8', '--naflex-loader',
       '--naflex-train-seq-lens', '4', '9', '--naflex-max-seq-len', '16']


@pytest.mark.parametrize('name', ['naflexvit_base_patch16_gap', 'naflexvit_small_cpool_patch16_gap'])
def test_a_run_trains_resumes_and_validates(name: str, run_train: Callable[..., Any], load: Callable[..., Any],
                                            image_root: str, validate_args: Callable[..., Any]) -> None:
    from cpool_vision.engine.validate.run import validate

    flags = ['--model', name, *RUN, '--model-ema', '--mixup', '0.2', '--reprob', '0.5']
    whole = run_train(*flags, '--experiment', 'whole')
    again = run_train(*flags, '--experiment', 'again', '--resume', f'{whole["folder"]}/checkpoint-0.pth.tar')
    one, two = load(whole['folder'], 'last.pth.tar'), load(again['folder'], 'last.pth.tar')
    assert all(torch.equal(value, two['state_dict'][key]) for key, value in one['state_dict'].items())
    assert again['epochs'][-1]['eval_loss'] == whole['epochs'][-1]['eval_loss']
    row = validate(validate_args(
        '--data-dir', image_root, '--model', name, *RUN[:5], '--naflex-loader', '--naflex-max-seq-len', '16',
        '--num-classes', '3', '--img-size', '32', '--checkpoint', f'{whole["folder"]}/last.pth.tar', '--use-ema',
        '-j', '0', '--device', 'cpu'))
    assert row['loss'] == pytest.approx(whole['epochs'][-1]['eval_loss'], abs=1e-3)
    assert pathlib.Path(whole['folder'], 'supports.csv').exists() == ('cpool' in name)
    other = run_train(*flags, '--experiment', 'unscaled', '--naflex-loss-scale', 'none')
    assert other['epochs'][-1]['train_loss'] != whole['epochs'][-1]['train_loss']


@pytest.mark.parametrize('workers', ['0', '2'])
def test_unreadable_images_are_replaced_listed_and_capped(
        build: Callable[..., Any], image_root: str, tmp_path: pathlib.Path, workers: str) -> None:
    root = tmp_path / 'broken'
    shutil.copytree(image_root, root)
    (root / 'train' / 'cat' / '3.png').write_bytes(b'garbage')
    (root / 'train' / 'dog' / '0.png').write_bytes(b'')
    flags = ['--data-dir', str(root), '-j', workers]
    loader = build(*flags, '--max-bad-samples', '2')[0]
    data.list_unreadable(loader, str(tmp_path))
    batches = take(loader)
    assert sum(len(target) for _, target in batches) == 24
    assert [(image.index, image.path) for image in unreadable_images(loader)] == [
        (3, 'cat/3.png'), (8, 'dog/0.png')]
    assert (tmp_path / 'unreadable.txt').read_text() == '3\tcat/3.png\n8\tdog/0.png\n'
    assert same(take(build(*flags, '--max-bad-samples', '2')[0]), batches)
    with pytest.raises(DatasetError, match=r'2 training images cannot be read, more than --max-bad-samples 1 allows'):
        take(build(*flags, '--max-bad-samples', '1')[0])
