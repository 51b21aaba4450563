"""No file of weights, settings or data runs code, whichever way it gets in."""
import argparse
import contextlib
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from timm.data.readers import class_map, reader_image_in_tar
from torchvision.datasets import cifar

from benchmarks import kill_test, release, results
from cpool_vision.cli import inspect, retrofit, train, validate
from cpool_vision.data import augment_config
from cpool_vision.data.augment import AugmentationError
from cpool_vision.data.augment_config import read_config
from cpool_vision.engine.checkpoints.checkpoint import read_checkpoint
from cpool_vision.engine.checkpoints.seal import save_sealed
from cpool_vision.errors import CheckpointError, UserError

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
    return release.release(path.parent, path.parent / 'entry', path.parent, '', f'python train.py --model {MODEL}', '')


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
    'inspect': Entry('a.pth.tar', CHECKPOINT, command(
        inspect.main, 'resnet_micro_cpool_32', '--checkpoint', 'PATH', '--json', 'FOLDER/o.json')),
    'inspect, model folder': Entry('m/pytorch_model.bin', CHECKPOINT, with_config(command(
        inspect.main, 'local-dir:FOLDER', '-o', 'FOLDER/o.png'))),
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


CONTROLS = [(name, kind) for name, entry in ENTRIES.items()
            for kind in (('archive',) if entry.kinds == CHECKPOINT else entry.kinds)]


def drop_guards(patch: pytest.MonkeyPatch) -> None:
    """Lets every reader that ours, timm's and torchvision's code calls run what the file says."""
    torch_load, numpy_load = torch.load, np.load

    def load_torch(*args: Any, **kwargs: Any) -> Any:
        return torch_load(*args, **{**kwargs, 'weights_only': False})

    def load_safetensors(path: Any, *_: Any, **__: Any) -> Any:
        with open(path, 'rb') as file:  # a path of this ending goes back to safetensors
            return load_torch(file)

    def load_numpy(path: Any, **_: Any) -> Any:
        arrays = numpy_load(path, allow_pickle=True)
        return {name: arrays[name] for name in arrays}

    def read_json(path: str, _: int) -> Any:
        content = pathlib.Path(path).read_bytes()
        try:
            return pickle.loads(content)  # noqa: S301
        except pickle.UnpicklingError:
            return yaml.unsafe_load(content)

    patch.setattr(torch, 'load', load_torch)
    patch.setattr(safetensors.torch, 'load_file', load_safetensors)
    patch.setattr(np, 'load', load_numpy)
    patch.setattr(augment_config, 'read_json', read_json)
    patch.setattr(yaml, 'safe_load', yaml.unsafe_load)
    patch.setattr(class_map, '_ClassMapUnpickler', pickle.Unpickler)
    patch.setattr(reader_image_in_tar, '_TarInfoUnpickler', pickle.Unpickler)
    patch.setattr(cifar, 'check_integrity', lambda *_: True)


@pytest.mark.parametrize('name, kind', CONTROLS)
def test_careless_readers_in_the_same_places_would_execute(
        name: str, kind: str, flag: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: every file is reached, and only the way of reading it protects."""
    drop_guards(monkeypatch)
    entry = ENTRIES[name]
    path = tmp_path / 'in' / entry.file
    path.parent.mkdir(parents=True)
    WRITERS[kind][0](path, flag)
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


def test_a_checkpoint_of_pytorch_in_parts_is_refused(tmp_path: pathlib.Path, flag: pathlib.Path) -> None:
    (tmp_path / 'a').mkdir()
    write_pickle(tmp_path / 'a' / '.metadata', flag)
    with pytest.raises(CheckpointError, match='is a folder: name a checkpoint file in it'):
        read_checkpoint(str(tmp_path / 'a'), '--resume')
    assert not flag.exists()
