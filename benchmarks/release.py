"""Makes an entry of the zoo of a finished run: `python -m benchmarks.release RUN models/NAME --data-dir DIR`.

The folder holds `model.safetensors` and `config.json` in timm's format, so that `local-dir:models/NAME` builds the
model with weights and normalization, and `release.json`, how it was made and what the last checkpoint scores by
`validate.py`. `python -m benchmarks.zoo --write` makes card and index of it.
"""
import argparse
import json
from pathlib import Path
from typing import Any

import timm

import cpool_vision  # noqa: F401  registers the variants
from cpool_vision.engine.model import load_model_weights
from cpool_vision.hub import save_for_hub

from .results import changed_settings, check_command, measure, read_settings

INPUT_KEYS = ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')


def load_run(run: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Model of a run with the weights of its last checkpoint, the run's settings, and what its input was."""
    settings = read_settings(run)
    model: Any = timm.create_model(settings['model'], num_classes=settings['num_classes'], **settings['model_kwargs'])
    load_model_weights(model, str(run / 'last.pth.tar'), 'run', settings['model'], use_ema=False)
    return model, settings, {key: settings[key] for key in INPUT_KEYS if settings[key]}


def release(run: Path, folder: Path, data_dir: Path, data: str, command: str, limits: str) -> None:
    """Writes the entry `folder` for the last checkpoint of `run`.

    Raises:
        FileExistsError: `folder` exists already.
        ValueError: `command` does not give the settings of the run.
    """
    if folder.exists():
        raise FileExistsError(f'{folder} exists: choose another name or remove it')
    check_command(command, read_settings(run))
    row = measure(run, data_dir)
    model, settings, data_config = load_run(run)
    labels = sorted(p.name for p in (data_dir / 'validation').iterdir())
    save_for_hub(model, folder, model_config={'label_names': labels}, data_config=data_config)
    facts = {
        'model': settings['model'], 'data': data, 'command': command, 'limits': limits,
        **{key: row[key] for key in ('train_images', 'epochs', 'params', 'macs', 'images', 'top1', 'top5', 'loss')},
        'settings': changed_settings(settings)}
    (folder / 'release.json').write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of a run of train.py')
    parser.add_argument('folder', type=Path, help='entry to write')
    parser.add_argument('--data-dir', type=Path, required=True, help='images that the run was trained with')
    parser.add_argument('--data', required=True, help='what these images are, for the card')
    parser.add_argument('--command', required=True, help='the command that trained it, for the card')
    parser.add_argument('--limits', default='', help='what the card should warn of')
    args = parser.parse_args()
    release(args.run, args.folder, args.data_dir, args.data, args.command, args.limits)
    for path in sorted(args.folder.iterdir()):
        print(f'{path.stat().st_size:>9} {path}')


if __name__ == '__main__':
    main()
