"""No file of weights, settings or data runs code, whichever way it gets in."""
import argparse
import contextlib
import hashlib
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from benchmarks import kill_test, release, results
from cpool_vision.cli import consolidate, draw, inspect, retrofit, train, validate
from cpool_vision.data.augment import AugmentationError
from cpool_vision.data.augment_config import read_config
from cpool_vision.engine.checkpoints import seal
from cpool_vision.engine.checkpoints.checkpoint import read_checkpoint
from cpool_vision.engine.checkpoints.folder_index import FORMAT, part_name
from cpool_vision.engine.checkpoints.parts import part_note, write_part
from cpool_vision.engine.checkpoints.seal import save_sealed
from cpool_vision.engine.errors import CheckpointError, UserError

MODEL = 'test_resnet'
DATA = ['--dataset', 'cpool/shapes', '--num-classes', '10', '-b', '8', '-j', '0', '--img-size', '32', '--device', 'cpu']
TRAIN = [*DATA, '--train-num-samples', '16', '--val-num-samples', '16', '--epochs', '1']


class Payload:
    """Makes a folder when it is unpickled carelessly."""

    def __init__(self, flag: pathlib.Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.flag,)


def write_pickle(path: pathlib.Path, flag: pathlib.Path) -> None:
    path.write_bytes(pickle.dumps({'state_dict': {'weight': Payload(flag)}, 'epoch': 0}))


def write_archive(path: pathlib.Path, flag: pathlib.Path) -> None:
    torch.save({'epoch': 0, 'state_dict': {'weight': torch.ones(1)}, 'payload': Payload(flag)}, path)


def write_legacy(path: pathlib.Path, flag: pathlib.Path) -> None:
    torch.save({'state_dict': {'weight': Payload(flag)}}, path, _use_new_zipfile_serialization=False)


def write_sealed(path: pathlib.Path, flag: pathlib.Path) -> None:
    save_sealed(str(path), {'epoch': 0, 'state_dict': {}, 'state_dict_ema': {'weight': Payload(flag)}}, 1)


def write_numpy(path: pathlib.Path, flag: pathlib.Path) -> None:
    with open(path, 'wb') as file:
        np.savez(file, weight=np.array([Payload(flag)], dtype=object))


def write_yaml(path: pathlib.Path, flag: pathlib.Path) -> None:
    path.write_text(f'model: {MODEL}\nlr: !!python/object/apply:os.mkdir ["{flag}"]\n')


def careless_pickle(path: pathlib.Path) -> None:
    pickle.loads(path.read_bytes())  # noqa: S301


def careless_torch(path: pathlib.Path) -> None:
    torch.load(path, weights_only=False)


def careless_numpy(path: pathlib.Path) -> None:
    np.load(path, allow_pickle=True)['weight']


def careless_yaml(path: pathlib.Path) -> None:
    yaml.unsafe_load(path.read_text())


WRITERS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    'pickle': (write_pickle, careless_pickle),
    'archive': (write_archive, careless_torch),
    'legacy': (write_legacy, careless_torch),
    'sealed': (write_sealed, careless_torch),
    'numpy': (write_numpy, careless_numpy),
    'yaml': (write_yaml, careless_yaml),
}
CHECKPOINT = ('pickle', 'archive', 'legacy', 'sealed')
PLAIN = ('pickle', 'archive', 'yaml')


class Entry(NamedTuple):
    """A way in: the name that the file must have, the kinds of payload, and what reads it."""

    file: str
    kinds: tuple[str, ...]
    read: Callable[[pathlib.Path], Any]


def command(main: Callable[..., Any], *flags: str) -> Callable[[pathlib.Path], Any]:
    """Runs a command line in which PATH and FOLDER stand for the file and its folder."""
    def read(path: pathlib.Path) -> Any:
        places = {'PATH': str(path), 'FOLDER': str(path.parent)}
        argv = []
        for flag in flags:
            for mark, place in places.items():
                flag = flag.replace(mark, place)
            argv.append(flag)
        return main(argv)
    return read


def with_config(read: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], Any]:
    """Adds the config.json that makes a folder one of the zoo."""
    def prepared(path: pathlib.Path) -> Any:
        (path.parent / 'config.json').write_text(
            '{"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}')
        return read(path)
    return prepared


def huge_tar(path: pathlib.Path) -> Any:
    """timm keeps a cache beside tars above 10 GB."""
    tar = path.parent / 'images.tar'
    with open(tar, 'wb') as file:
        file.truncate(10 * 1024 ** 3 + 1)
    try:
        return train.main(['--model', MODEL, '--data-dir', str(tar), *TRAIN[2:]])
    finally:
        tar.unlink()


def evaluate(path: pathlib.Path) -> Any:
    """benchmarks.results and benchmarks.release read the settings and the checkpoint of a run."""
    if path.name == 'last.pth.tar':
        settings = {'model': MODEL, 'num_classes': 10, 'model_kwargs': {}, 'data_dir': ''}
        settings.update(dict.fromkeys(('mean', 'std', 'input_size', 'crop_pct')))
        (path.parent / 'args.yaml').write_text(yaml.safe_dump(settings))
    return results.measure(path.parent, path.parent)


def compare(path: pathlib.Path) -> Any:
    return kill_test.compare_checkpoints(path, path)


def publish(path: pathlib.Path) -> Any:
    return release.release(path.parent, path.parent / 'entry', path.parent, '', '', '')


def report_on(path: pathlib.Path) -> Any:
    (path.parent / 'summary.csv').write_text('epoch,train_loss\n0,1\n')
    return inspect.main(['--run', str(path.parent), '--html', str(path.parent / 'o.html')])


def validate_retrofitted(path: pathlib.Path) -> Any:
    retrofit.main(['test_resnet', '-o', str(path.parent.parent / 'made')])
    shutil.copy(path.parent.parent / 'made' / 'config.json', path.parent)
    return validate.main(['--model', f'local-dir:{path.parent}', *DATA, '--num-samples', '16'])


TORCH_SET = 'cifar-10-batches-py/data_batch_1'
ENTRIES = {
    'resume': Entry('a.pth.tar', CHECKPOINT, command(train.main, '--model', MODEL, *TRAIN, '--resume', 'PATH')),
    'resume auto': Entry('x/last.pth.tar', CHECKPOINT, command(
        train.main, '--model', MODEL, *TRAIN, '--resume', 'auto', '--output', 'FOLDER/..', '--experiment', 'x')),
    'resume auto, recovery': Entry('x/recovery-0-1.pth.tar', CHECKPOINT, command(
        train.main, '--model', MODEL, *TRAIN, '--resume', 'auto', '--output', 'FOLDER/..', '--experiment', 'x')),
    'initial checkpoint': Entry('a.pth', CHECKPOINT, command(
        train.main, '--model', MODEL, *TRAIN, '--initial-checkpoint', 'PATH')),
    'initial checkpoint, safetensors': Entry('a.safetensors', CHECKPOINT, command(
        train.main, '--model', MODEL, *TRAIN, '--initial-checkpoint', 'PATH')),
    'initial checkpoint, npz': Entry('a.npz', ('numpy', 'pickle'), command(
        train.main, '--model', 'vit_tiny_patch16_224', *TRAIN, '--initial-checkpoint', 'PATH')),
    'pretrained path': Entry('a.pth', CHECKPOINT, command(
        train.main, '--model', MODEL, *TRAIN, '--pretrained', '--pretrained-path', 'PATH')),
    'teacher': Entry('t/pytorch_model.bin', CHECKPOINT, with_config(command(
        train.main, '--model', MODEL, *TRAIN, '--kd-model-name', 'local-dir:FOLDER'))),
    'teacher, safetensors': Entry('t/model.safetensors', CHECKPOINT, with_config(command(
        train.main, '--model', MODEL, *TRAIN, '--kd-model-name', 'local-dir:FOLDER'))),
    'model folder, train': Entry('m/pytorch_model.bin', CHECKPOINT, with_config(command(
        train.main, '--model', 'local-dir:FOLDER', *TRAIN, '--pretrained'))),
    'model folder, validate': Entry('m/pytorch_model.bin', CHECKPOINT, with_config(command(
        validate.main, '--model', 'local-dir:FOLDER', *DATA))),
    'model folder, safetensors': Entry('m/model.safetensors', CHECKPOINT, with_config(command(
        validate.main, '--model', 'local-dir:FOLDER', *DATA))),
    'validate': Entry('a.pth.tar', CHECKPOINT, command(
        validate.main, '--model', MODEL, *DATA, '--checkpoint', 'PATH')),
    'validate, average': Entry('a.pth.tar', CHECKPOINT, command(
        validate.main, '--model', MODEL, *DATA, '--use-ema', '--checkpoint', 'PATH')),
    'validate, folder': Entry('run/a.pth.tar', CHECKPOINT, command(
        validate.main, '--model', MODEL, *DATA, '--checkpoint', 'FOLDER')),
    'draw': Entry('a.pth.tar', CHECKPOINT, command(
        draw.main, 'resnet_micro_cpool_32', '--checkpoint', 'PATH', '-o', 'FOLDER/o.png')),
    'draw, model folder': Entry('m/pytorch_model.bin', CHECKPOINT, with_config(command(
        draw.main, 'local-dir:FOLDER', '-o', 'FOLDER/o.png'))),
    'inspect': Entry('a.pth.tar', CHECKPOINT, command(
        inspect.main, 'resnet_micro_cpool_32', '--checkpoint', 'PATH', '--json', 'FOLDER/o.json')),
    'inspect, settings of a run': Entry('run/args.yaml', ('yaml',), lambda path: report_on(path)),
    'retrofit': Entry('a.pth.tar', CHECKPOINT, command(
        retrofit.main, 'resnet18', '--checkpoint', 'PATH', '-o', 'FOLDER/out')),
    'retrofitted model folder': Entry('m/pytorch_model.bin', CHECKPOINT, lambda path: validate_retrofitted(path)),
    'settings': Entry('a.yaml', ('yaml',), command(train.main, '--config', 'PATH', *TRAIN)),
    'augmentation': Entry('a.yaml', ('yaml',), command(train.main, '--model', MODEL, *TRAIN, '--aug-config', 'PATH')),
    'augmentation, json': Entry('a.json', ('yaml', 'pickle'), command(
        train.main, '--model', MODEL, *TRAIN, '--aug-config', 'PATH')),
    'class map': Entry('map.pkl', ('pickle',), command(
        train.main, '--model', MODEL, '--data-dir', 'FOLDER', *TRAIN[2:], '--class-map', 'PATH')),
    'cache of a tar': Entry('_images_tarinfos.pickle', ('pickle',), huge_tar),
    'torchvision set': Entry(TORCH_SET, ('pickle',), command(
        train.main, '--model', MODEL, *TRAIN[2:], '--dataset', 'torch/cifar10', '--data-dir', 'FOLDER/..')),
    'results, settings': Entry('run/args.yaml', ('yaml',), evaluate),
    'results, weights': Entry('run/last.pth.tar', CHECKPOINT, evaluate),
    'release, settings': Entry('run/args.yaml', ('yaml',), publish),
    'resume, parts': Entry('a.sharded/index.json', PLAIN, command(
        train.main, '--model', MODEL, *TRAIN, '--resume', 'FOLDER')),
    'resume auto, parts': Entry('x/last.sharded/index.json', PLAIN, command(
        train.main, '--model', MODEL, *TRAIN, '--resume', 'auto', '--output', 'FOLDER/../..', '--experiment', 'x')),
    'initial checkpoint, parts': Entry('a.sharded/index.json', PLAIN, command(
        train.main, '--model', MODEL, *TRAIN, '--initial-checkpoint', 'FOLDER')),
    'validate, parts': Entry('a.sharded/index.json', PLAIN, command(
        validate.main, '--model', MODEL, *DATA, '--checkpoint', 'FOLDER')),
    'consolidate': Entry('a.sharded/index.json', PLAIN, command(
        consolidate.main, 'FOLDER', '-o', 'FOLDER/o.pth.tar')),
    'consolidate, file': Entry('a.pth.tar', CHECKPOINT, command(
        consolidate.main, 'PATH', '-o', 'FOLDER/o.safetensors')),
    'kill test': Entry('a.pth.tar', CHECKPOINT, compare),
}
CASES = [(name, kind) for name, entry in ENTRIES.items() for kind in entry.kinds]


@pytest.fixture
def flag(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """What the payload makes; the working directory, where runs go by default, is a temporary one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CPOOL_DEBUG', '1')  # the commands raise then
    return tmp_path / 'executed'


@pytest.mark.parametrize('name, kind', CASES)
def test_nothing_is_executed_and_the_error_names_the_file(
        name: str, kind: str, flag: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = ENTRIES[name]
    path = tmp_path / 'in' / entry.file
    path.parent.mkdir(parents=True)
    WRITERS[kind][0](path, flag)
    with pytest.raises(UserError) as raised:
        entry.read(path)
    assert not flag.exists()
    told = str(raised.value) + caplog.text
    assert str(path) in told or str(path.parent) in told or str(path.parent.parent) in told


THROUGH_TORCH = [name for name, entry in ENTRIES.items() if entry.kinds == CHECKPOINT and 'safetensors' not in name]
THROUGH_YAML = [name for name, entry in ENTRIES.items() if entry.kinds == ('yaml',)]


@pytest.mark.parametrize('name', [*THROUGH_TORCH, *THROUGH_YAML])
def test_careless_readers_in_the_same_places_would_execute(
        name: str, flag: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the file is reached, and only the way of reading it protects."""
    real = torch.load
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: real(*args, **{**kwargs, 'weights_only': False}))
    monkeypatch.setattr(yaml, 'safe_load', yaml.unsafe_load)
    entry = ENTRIES[name]
    path = tmp_path / 'in' / entry.file
    path.parent.mkdir(parents=True)
    WRITERS['archive' if name in THROUGH_TORCH else 'yaml'][0](path, flag)
    with contextlib.suppress(Exception):
        entry.read(path)
    assert flag.is_dir()


@pytest.mark.parametrize('kind', sorted(WRITERS))
def test_the_payloads_are_live(kind: str, flag: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Control: careless readers run them."""
    write, careless = WRITERS[kind]
    write(tmp_path / 'payload', flag)
    assert not flag.exists()
    careless(tmp_path / 'payload')
    assert flag.is_dir()


def test_a_json_pipeline_names_no_code(flag: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for index, name in enumerate(('os.mkdir', 'albumentations.Lambda', 'cpool_vision.cli.train.main')):
        path = tmp_path / f'{index}.json'
        path.write_text(f'[{{"__class_fullname__": "{name}", "path": "{flag}"}}]')
        with pytest.raises(UserError, match=f'{index}.json'):
            train.main(['--model', MODEL, *TRAIN, '--aug-config', str(path)])
        assert not flag.exists()
    with pytest.raises(AugmentationError):
        read_config(str(tmp_path / 'absent.json'))


@pytest.mark.parametrize('flags', [
    ['--model-kwargs', 'act_layer=__import__("os").mkdir("{flag}")'],
    ['--opt-kwargs', 'eps=__import__("os").mkdir("{flag}")'],
])
def test_arguments_on_the_command_line_are_values(flags: list[str], flag: pathlib.Path) -> None:
    """timm reads KEY=VALUE as a literal of Python, and as text where it is none."""
    with contextlib.suppress(Exception):  # the text may or may not be of use as a value
        train.main(['--model', MODEL, *TRAIN, *(each.format(flag=flag) for each in flags)])
    assert not flag.exists()


def test_settings_of_timms_own_checkpoints_are_read_as_values(tmp_path: pathlib.Path, flag: pathlib.Path) -> None:
    """A Namespace is let through, with nothing but plain values in it."""
    path = tmp_path / 'a.pth.tar'
    torch.save({'args': argparse.Namespace(lr=1.), 'state_dict': {}}, path)
    assert read_checkpoint(str(path), '--resume')['args'].lr == 1.
    torch.save({'args': argparse.Namespace(lr=Payload(flag)), 'state_dict': {}}, path)
    with pytest.raises(CheckpointError, match='a.pth.tar'):
        read_checkpoint(str(path), '--resume')
    assert not flag.exists()
    shutil.rmtree(flag, ignore_errors=True)


Index = dict[str, Any]


def write_folder(path: pathlib.Path, change: Callable[[Index], Any] = lambda index: None,
                 payload: Callable[[pathlib.Path], None] | None = None) -> None:
    """A checkpoint in one part, with an index that was altered and sealed by someone who knows how."""
    path.mkdir(parents=True)
    part = path / part_name(0, 1)
    digest, size = write_part(str(part), {'state_dict/weight': torch.arange(4.)}, {'part': part_note(0, 1)})
    if payload is not None:
        payload(part)
        digest, size = seal.hash_file(str(part)).digest(), part.stat().st_size
    index = {
        'format': FORMAT, 'files': [{'name': part.name, 'bytes': size, 'sha256': digest.hex()}],
        'tensors': {'state_dict/weight': {'shape': [4], 'dtype': 'F32', 'dim': 0, 'offsets': [0, 4]}},
        'state': {'epoch': 0, 'state_dict': {'weight': {'$tensor': 'state_dict/weight'}}}}
    change(index)
    (path / 'index.json').write_bytes(seal.seal_json(index, 1))


def elsewhere(index: Index, name: str) -> None:
    index['files'][0]['name'] = name


def shaped(index: Index, **values: Any) -> None:
    index['tensors']['state_dict/weight'].update(values)


def referring(index: Index, value: Any) -> None:
    index['state']['state_dict']['weight'] = value


INDICES: dict[str, tuple[Callable[[Index], Any], str]] = {
    'a file above': (lambda index: elsewhere(index, '../secret.safetensors'), r"'\.\./secret.safetensors', expected"),
    'an absolute file': (lambda index: elsewhere(index, '/etc/passwd'), "'/etc/passwd', expected 'part-00000"),
    'another file': (lambda index: elsewhere(index, 'secret.safetensors'), "expected 'part-00000"),
    'a huge tensor': (lambda index: shaped(index, shape=[2 ** 40], offsets=[0, 2 ** 40]), 'larger than the files'),
    'a huge whole tensor': (lambda index: shaped(index, shape=[2 ** 40], dim=None, offsets=[]), 'larger than the f'),
    'a huge product': (lambda index: shaped(index, shape=[2 ** 31] * 4, offsets=[0, 2 ** 31]), 'too large'),
    'a huge empty tensor': (lambda index: shaped(index, shape=[0, 2 ** 80], offsets=[0, 0]), 'too large'),
    'a slightly larger tensor': (lambda index: shaped(index, shape=[80], offsets=[0, 80]), 'larger than the files'),
    'a negative size': (lambda index: shaped(index, shape=[-4]), 'not a list of sizes'),
    'a size that is no integer': (lambda index: shaped(index, shape=[4.0]), 'not a list of sizes'),
    'a truth value for a size': (lambda index: shaped(index, shape=[True]), 'not a list of sizes'),
    'parts beyond the tensor': (lambda index: shaped(index, offsets=[0, 9]), 'do not make up'),
    'too many parts': (lambda index: shaped(index, offsets=[0, 2, 4]), 'do not make up'),
    'parts backwards': (lambda index: shaped(index, offsets=[4, 0]), 'do not make up'),
    'another dimension': (lambda index: shaped(index, dim=1), 'do not make up'),
    'a dimension that is no number': (lambda index: shaped(index, dim='0'), 'do not make up'),
    'an unknown dtype': (lambda index: shaped(index, dtype='OBJECT'), "unknown dtype 'OBJECT'"),
    'another shape than the file': (lambda index: shaped(index, shape=[2, 2], offsets=[0, 2]), r'expected F32 \[2, 2'),
    'another dtype than the file': (lambda index: shaped(index, dtype='I32'), r'expected I32 \[4\]'),
    'a tensor used twice': (lambda index: index['state'].update(again={'$tensor': 'state_dict/weight'}), 'damaged'),
    'an absent tensor': (lambda index: referring(index, {'$tensor': 'other'}), 'damaged'),
    'a reference that is no name': (lambda index: referring(index, {'$tensor': []}), 'damaged'),
    'keys that are no keys': (lambda index: referring(index, {'$items': [[[], 1]]}), 'damaged'),
    'unused tensors': (lambda index: index['state'].clear(), 'leaves out state_dict/weight'),
    'no state': (lambda index: index.pop('state'), 'damaged'),
    'a list as state': (lambda index: index.update(state=[index['state']]), 'leaves out everything'),
    'no files': (lambda index: index.update(files=[]), 'damaged'),
    'files that are none': (lambda index: index.update(files='part'), 'damaged'),
    'tensors that are none': (lambda index: index.update(tensors=[1]), 'damaged'),
    'another format': (lambda index: index.update(format='x'), "format is 'x'"),
}


@pytest.mark.parametrize('name', sorted(INDICES))
def test_an_index_cannot_lead_elsewhere_or_ask_for_memory(name: str, tmp_path: pathlib.Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = INDICES[name]
    write_folder(tmp_path / 'good')
    assert read_checkpoint(str(tmp_path / 'good'), '')['state_dict']['weight'].tolist() == [0, 1, 2, 3]  # control
    write_folder(tmp_path / 'in' / 'bad', change)
    for folder in (tmp_path / 'in', tmp_path / 'in' / 'bad'):
        shutil.copy(tmp_path / 'good' / part_name(0, 1), folder / 'secret.safetensors')
    sizes: list[int] = []
    real = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda shape, **options: sizes.append(int(np.prod(shape))) or real(
        shape, **options))
    with pytest.raises(CheckpointError, match=words) as raised:
        read_checkpoint(str(tmp_path / 'in' / 'bad'), '--resume')
    assert 'use another copy' in str(raised.value) and max(sizes, default=0) <= 4


def test_an_index_of_endless_depth_is_an_error(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path / 'a')
    text = b'"content": ' + b'[' * 100000 + b']' * 100000 + b'}\n'
    head = seal.seal_json({}, 1).partition(b'\n')[0]
    stale, = [part for part in head.split(b'"') if len(part) == 64]
    (tmp_path / 'a' / 'index.json').write_bytes(
        head.replace(stale, hashlib.sha256(text).hexdigest().encode()) + b'\n' + text)
    with pytest.raises(CheckpointError, match='recursion'):
        read_checkpoint(str(tmp_path / 'a'), '--resume')


@pytest.mark.parametrize('kind', CHECKPOINT)
def test_a_part_that_is_a_pickle_is_not_executed(kind: str, tmp_path: pathlib.Path, flag: pathlib.Path) -> None:
    """With a size and a hash to match."""
    write_folder(tmp_path / 'a', payload=lambda part: WRITERS[kind][0](part, flag))
    for read in (lambda: read_checkpoint(str(tmp_path / 'a'), '--resume'),
                 lambda: consolidate.main([str(tmp_path / 'a'), '-o', str(tmp_path / 'o.safetensors')]),
                 lambda: validate.main(['--model', MODEL, *DATA, '--checkpoint', str(tmp_path / 'a')])):
        with pytest.raises(CheckpointError, match='part-00000-of-00001.* cannot be read'):
            read()
    assert not flag.exists() and not (tmp_path / 'o.safetensors').exists()


def test_a_checkpoint_of_pytorch_in_parts_is_refused(tmp_path: pathlib.Path, flag: pathlib.Path) -> None:
    (tmp_path / 'a').mkdir()
    write_pickle(tmp_path / 'a' / '.metadata', flag)
    with pytest.raises(CheckpointError, match='no checkpoint: a folder of parts has the file index.json'):
        read_checkpoint(str(tmp_path / 'a'), '--resume')
    assert not flag.exists()
