"""Makes an entry of the zoo of a finished run: `python -m benchmarks.release RUN models/NAME --data-dir DIR`.

The folder holds `model.safetensors` and `config.json` in timm's format, so that `local-dir:models/NAME` builds the
model with weights and normalisation, and `README.md`, a card with the last checkpoint's figures by `validate.py`.
"""
import argparse
import json
from pathlib import Path
from typing import Any

import timm

import cpool_vision  # noqa: F401  registers the variants
from cpool_vision.engine.checkpoints.checkpoint import load_weights, read_weights
from cpool_vision.engine.flags import args_train
from cpool_vision.hub import save_for_hub

from .results import measure, read_settings

INPUT_KEYS = ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')
NO_BEARING = {
    'config', 'data_dir', 'output', 'experiment', 'workers', 'log_interval', 'checkpoint_hist', 'resume', 'device',
    'val_interval', 'validation_batch_size', 'model', 'num_classes'}

CARD = '''# {name}

`{model}` with context pooling (Huang et al., ICML 2022, https://arxiv.org/abs/2207.01844), trained from scratch on
{data} by `train.py` of cpool_vision at its defaults but for:

```
{flags}
```

| training images | epochs | parameters (M) | MACs (M) | validation images | top-1 (%) | top-5 (%) | loss |
|---|---|---|---|---|---|---|---|
| {train_images:,} | {epochs} | {params_m:.3f} | {macs_m:.1f} | {images:,} | {top1:.2f} | {top5:.2f} | {loss:.3f} |

The figures are those of the last epoch, by

```bash
python validate.py --model local-dir:models/{name} --data-dir DIR    # DIR/validation/CLASS/*
```

{limits}

```python
import timm
import cpool_vision

model = timm.create_model('local-dir:models/{name}', pretrained=True).eval()
```

Input: {size} x {size} RGB, scaled to [0, 1], mean {mean}, standard deviation {std}. Labels are the class folders in
alphabetical order: {labels}.

Licence of the weights: Apache-2.0.
'''


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What of `args.yaml` differs from the defaults of train.py and bears on the result."""
    defaults = vars(args_train.build_parser().parse_args([]))
    return {key: value for key, value in settings.items()
            if key in defaults and key not in NO_BEARING and value != defaults[key]}


def load_run(run: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Model of a run with the weights of its last checkpoint, the run's settings, and what its input was."""
    settings = read_settings(run)
    model: Any = timm.create_model(settings['model'], num_classes=settings['num_classes'], **settings['model_kwargs'])
    checkpoint = str(run / 'last.pth.tar')
    load_weights(model, read_weights(checkpoint, 'run', use_ema=False), checkpoint, 'run', settings['model'])
    return model, settings, {key: settings[key] for key in INPUT_KEYS if settings[key]}


def release(run: Path, folder: Path, data_dir: Path, data: str, limits: str) -> None:
    """Writes the entry `folder` for the last checkpoint of `run`.

    Raises:
        FileExistsError: `folder` exists already.
    """
    if folder.exists():
        raise FileExistsError(f'{folder} exists: choose another name or remove it')
    row = measure(run, data_dir)
    model, settings, data_config = load_run(run)
    labels = sorted(p.name for p in (data_dir / 'validation').iterdir())
    save_for_hub(
        model, folder,
        model_config={'label_names': labels},
        data_config=data_config)
    cfg = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['pretrained_cfg']
    card = CARD.format(
        name=folder.name, model=settings['model'], data=data, limits=limits,
        flags='\n'.join(f'{key}: {value}' for key, value in changed_settings(settings).items()),
        params_m=row['params'] / 1e6, macs_m=row['macs'] / 1e6, size=cfg['input_size'][-1],
        mean=cfg['mean'], std=cfg['std'], labels=', '.join(labels),
        **{key: row[key] for key in ('train_images', 'epochs', 'images', 'top1', 'top5', 'loss')})
    (folder / 'README.md').write_text(card, encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of a run of train.py')
    parser.add_argument('folder', type=Path, help='entry to write')
    parser.add_argument('--data-dir', type=Path, required=True, help='images that the run was trained with')
    parser.add_argument('--data', required=True, help='what these images are, for the card')
    parser.add_argument('--limits', default='', help='what the card should warn of')
    args = parser.parse_args()
    release(args.run, args.folder, args.data_dir, args.data, args.limits)
    for path in sorted(args.folder.iterdir()):
        print(f'{path.stat().st_size:>9} {path}')


if __name__ == '__main__':
    main()
