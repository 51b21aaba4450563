"""Scores finished training runs of one recipe and puts the figures beside an entry of the zoo.

    python -m benchmarks.results RUN... --data-dir DIR --entry models/NAME --data WORDS --command COMMAND

The runs differ in `--model-kwargs` alone. Each is measured by validate.py's own function at its last checkpoint: to
choose the best epoch by the validation images would be biased. The figures go into the entry's `release.json`, and
`python -m benchmarks.zoo --write` makes tables of them.
"""
import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import timm

import cpool_vision  # noqa: F401  registers the variants
from cpool_vision.engine.settings import train
from cpool_vision.engine.settings.config import parse_args, read_validate, read_yaml
from cpool_vision.engine.validate.run import validate

from .model_table import count
from .study.runner import write_text

NO_BEARING = {
    'config', 'data_dir', 'output', 'experiment', 'workers', 'log_interval', 'checkpoint_hist', 'resume', 'device',
    'val_interval', 'validation_batch_size', 'model', 'num_classes'}
PLAIN, POOL, DEPTHWISE = 'plain base', 'context pool', 'depthwise 7x7 convolution'


def read_settings(run: Path) -> dict[str, Any]:
    """Settings of a run, by the names of train.py's flags."""
    settings = read_yaml(str(run / 'args.yaml'))
    return dict(settings, model_kwargs=settings['model_kwargs'] or {})


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What of `args.yaml` differs from the defaults of train.py and bears on the result."""
    defaults = vars(train.build_parser().parse_args([]))
    return {key: value for key, value in settings.items()
            if key in defaults and key not in NO_BEARING and value != defaults[key]}


def command_settings(command: str) -> tuple[str, dict[str, Any]]:
    """Model and changed settings that a printed command of train.py gives.

    Raises:
        ValueError: the command is none of train.py.
    """
    words = shlex.split(command.replace('\\\n', ' '))
    if words[:2] != ['python', 'train.py']:
        raise ValueError(f'a card prints a command that begins with "python train.py", got {command!r}')
    args = vars(parse_args(train.build_parser, words[2:]))
    return args['model'], changed_settings(args)


def check_command(command: str, settings: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Insists that a printed command gives the settings of a run, but for the keys of `ignore`.

    Raises:
        ValueError: it gives another model or other settings; the message names them.
    """
    model, given = command_settings(command)
    trained = changed_settings(settings)
    other = sorted(key for key in {*given, *trained} - {*ignore} if given.get(key) != trained.get(key))
    if model != settings['model']:
        other.insert(0, 'model')
    if other:
        raise ValueError(f'the command {command!r} does not give the settings of the run ({", ".join(other)} differ): '
                         'print the command that trained it')


def arm_name(model_kwargs: dict[str, Any]) -> str:
    """What stands in the pools' places of a variant, in words."""
    if model_kwargs.get('cpool_positions') in ([], 'none'):
        return PLAIN
    mixer = model_kwargs.get('cpool_mixer', 'context')
    name = {'context': POOL, 'depthwise7': DEPTHWISE}.get(mixer, mixer)
    beside = model_kwargs.get('cpool_depthwise')
    return f'{name} beside a depthwise {beside}x{beside} convolution' if beside else name


def measure(run: Path, data_dir: Path, split: str = 'validation') -> dict[str, Any]:
    """What the run was, and what its last checkpoint scores on all images of a split."""
    settings = read_settings(run)
    kwargs = settings['model_kwargs']
    argv = ['--model', settings['model'], '--checkpoint', str(run / 'last.pth.tar'), '--data-dir', str(data_dir),
            '--split', split, '--num-classes', str(settings['num_classes']), '--workers', '0', '--log-freq', '1000']
    for flag in ('mean', 'std', 'input_size'):
        if settings[flag]:
            argv += [f'--{flag.replace("_", "-")}', *map(str, settings[flag])]
    if settings['crop_pct']:
        argv += ['--crop-pct', str(settings['crop_pct'])]
    if kwargs:
        argv += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    row = validate(read_validate(argv))
    _, params, macs = count(settings['model'], num_classes=settings['num_classes'], **kwargs)
    epochs = (run / 'summary.csv').read_text(encoding='utf-8').strip().splitlines()
    train_images = sum(1 for _ in timm.data.create_reader('', str(Path(settings['data_dir']) / 'train')))
    return {
        'model': settings['model'],
        'arm': arm_name(kwargs),
        'train_images': train_images,
        'epochs': len(epochs) - 1,
        'params': params,
        'macs': macs,
        'top1': row['top1'],
        'top5': row['top5'],
        'loss': row['loss'],
        'images': row['images'],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        '| model | arm | training images | epochs | parameters (M) | MACs (M) | top-1 (%) | top-5 (%) | loss |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    lines += [
        f'| `{r["model"]}` | {r["arm"]} | {r["train_images"]:,} | {r["epochs"]} | {r["params"] / 1e6:.3f} '
        f'| {r["macs"] / 1e6:.1f} | {r["top1"]:.2f} | {r["top5"]:.2f} | {r["loss"]:.3f} |'
        for r in rows
    ]
    return '\n'.join(lines)


def add_twins(entry: Path, runs: list[Path], data_dir: Path, data: str, command: str) -> list[dict[str, Any]]:
    """Writes the figures of `runs` into `release.json` of `entry`; returns what `measure` says of each.

    Args:
        entry: folder of the zoo.
        runs: folders of train.py, the plain base among them; of one recipe, told apart by `--model-kwargs`.
        data_dir: holds the images to score, `validation/CLASS/*`.
        data: what was trained on, for the card.
        command: the command that trained them, without `--model-kwargs`.

    Raises:
        ValueError: a run is of another model or recipe, two runs are of one arm, or none is the plain base.
    """
    file = entry / 'release.json'
    facts = json.loads(file.read_text(encoding='utf-8'))
    settings = [read_settings(run) for run in runs]
    arms = [arm_name(each['model_kwargs']) for each in settings]
    if len(set(arms)) < len(arms) or PLAIN not in arms:
        raise ValueError(f'the runs must be of different arms, with the {PLAIN} among them, got {", ".join(arms)}')
    for each in settings:
        if each['model'] != facts['model']:
            raise ValueError(
                f'{entry} holds {facts["model"]!r}, a run is of {each["model"]!r}: name runs of that model')
        check_command(command, each, ('model_kwargs',))
    rows = [measure(run, data_dir) for run in runs]
    if len({(row['train_images'], row['epochs'], row['images']) for row in rows}) > 1:
        raise ValueError('the runs differ in training images, epochs or validation images: finish them by one recipe')
    facts['twins'] = {
        'data': data, 'command': command, **{key: rows[0][key] for key in ('train_images', 'epochs', 'images')},
        'rows': [{'arm': row['arm'], 'model_kwargs': each['model_kwargs'],
                  **{key: row[key] for key in ('params', 'macs', 'top1', 'top5', 'loss')}}
                 for row, each in zip(rows, settings, strict=True)]}
    write_text(file, json.dumps(facts, indent=1) + '\n')
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path)
    parser.add_argument('--data-dir', type=Path, required=True, help='holds validation/CLASS/*')
    parser.add_argument('--entry', type=Path, required=True, help='entry of the zoo whose twins the runs are')
    parser.add_argument('--data', required=True, help='what the runs were trained on, for the card')
    parser.add_argument('--command', required=True, help='what trained them, without --model-kwargs, for the card')
    args = parser.parse_args()
    print(format_table(add_twins(args.entry, args.runs, args.data_dir, args.data, args.command)))


if __name__ == '__main__':
    main()
