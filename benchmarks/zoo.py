"""Cards, index and reference logits of the zoo: `python -m benchmarks.zoo --write`; without the flag says what differs.

An entry is a folder of models/ with `model.safetensors` and `config.json` in timm's format and `release.json`: how it
was made and what it scored. README.md of the entry and of models/ follow from these. Reference logits, of images that
follow from a formula, are written for new entries only: they are what later versions are held to.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import cpool_vision  # noqa: F401  registers the variants

from .markers import print_difference

MODELS = Path(__file__).resolve().parents[1] / 'models'
LOGITS = Path(__file__).resolve().parents[1] / 'tests' / 'models' / 'zoo_logits.json'
_IMAGES = 4

_CARD = '''---
library_name: timm
pipeline_tag: image-classification
license: apache-2.0
datasets:
- uoft-cs/cifar10
tags:
- image-classification
- timm
- context-pooling
---

# {name}

![Supports and pooling weights over images]({picture})

`{model}` with context pooling (Huang et al., ICML 2022, https://arxiv.org/abs/2207.01844), trained from scratch on
{data} by

```bash
{command}
```

What differs from the defaults of `train.py`:

```
{flags}
```

| training images | epochs | parameters (M) | MACs (M) | validation images | top-1 (%) | top-5 (%) | loss |
|---|---|---|---|---|---|---|---|
| {train_images:,} | {epochs} | {params_m:.3f} | {macs_m:.1f} | {images:,} | {top1:.2f} | {top5:.2f} | {loss:.3f} |

The figures are those of the last epoch, by

```bash
python validate.py --model local-dir:models/{name} --pretrained --data-dir DIR    # DIR/validation/CLASS/*
```

{limits}

```python
import timm
import cpool_vision

model = timm.create_model('local-dir:models/{name}', pretrained=True).eval()
```

Input: {size} x {size} RGB, scaled to [0, 1], mean {mean}, standard deviation {std}. Labels are the class folders in
alphabetical order: {labels}.

The picture: circles have a radius of one standard deviation of the pooling mask; the weight map shows the binary
logarithm of a pixel's weight over that of a uniform map (`{draw}`).

Licence of the weights: Apache-2.0.
'''

_INDEX = '''# Released models

Small models trained from scratch by the committed configs: demonstrations of each family, not for use on other images.
A folder loads by `timm.create_model('local-dir:models/NAME', pretrained=True)` after `import cpool_vision`; its card
says how it was trained and scored. This page is written by `python -m benchmarks.zoo --write`.

| model | data | epochs | parameters (M) | MACs (M) | top-1 (%) | weights (MB) |
|---|---|---:|---:|---:|---:|---:|
{rows}
'''


def entries() -> list[Path]:
    """Folders of the zoo, by name."""
    return sorted(path.parent for path in MODELS.glob('*/release.json'))


def draw_command(name: str) -> str:
    """The command that drew the picture of an entry."""
    return (f'cpool-inspect local-dir:models/{name} --data-dir DIR --num-images 3 --layers 2 --dpi 110 '
            f'-o models/{name}/supports.png')


def card(folder: Path) -> str:
    """Contents of an entry's README.md."""
    facts = json.loads((folder / 'release.json').read_text(encoding='utf-8'))
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    cfg = config['pretrained_cfg']
    return _CARD.format(
        name=folder.name, picture='supports.png', draw=draw_command(folder.name),
        flags='\n'.join(f'{key}: {value}' for key, value in facts['settings'].items()),
        params_m=facts['params'] / 1e6, macs_m=facts['macs'] / 1e6, size=cfg['input_size'][-1],
        mean=cfg['mean'], std=cfg['std'], labels=', '.join(config['label_names']),
        **{key: facts[key] for key in (
            'model', 'data', 'command', 'limits', 'train_images', 'epochs', 'images', 'top1', 'top5', 'loss')})


def index() -> str:
    """Contents of models/README.md."""
    rows = []
    for folder in entries():
        facts = json.loads((folder / 'release.json').read_text(encoding='utf-8'))
        size = (folder / 'model.safetensors').stat().st_size
        rows.append(
            f'| [{folder.name}]({folder.name}/README.md) | {facts["data"]} | {facts["epochs"]} '
            f'| {facts["params"] / 1e6:.3f} | {facts["macs"] / 1e6:.1f} | {facts["top1"]:.2f} | {size / 1e6:.1f} |')
    return _INDEX.format(rows='\n'.join(rows))


def reference_images(height: int, width: int) -> Tensor:
    """Images `(4, 3, height, width)` in [0, 1] that follow from integers alone: colored waves of growing frequency."""
    i, c = torch.arange(_IMAGES).view(-1, 1, 1, 1), torch.arange(3).view(1, -1, 1, 1)
    y, x = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    phase = (3 + 4 * i + c) * y + (5 + 2 * i * c) * x + 40 * c + (x * y * (i + 1)) // 8
    return (phase % 256).sub(128).abs().mul(2).clamp(max=255).float() / 255


def reference_logits(folder: Path) -> Tensor:
    """Logits `(4, classes)` in fp32 of an entry for the reference images."""
    model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        return model((reference_images(*cfg['input_size'][1:]) - mean) / std)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true')
    args = parser.parse_args()
    wanted = {folder / 'README.md': card(folder) for folder in entries()}
    wanted[MODELS / 'README.md'] = index()
    logits = json.loads(LOGITS.read_text(encoding='utf-8')) if LOGITS.exists() else {}
    for folder in entries():
        if folder.name not in logits:
            logits[folder.name] = [[round(v, 5) for v in row] for row in reference_logits(folder).tolist()]
    lines = [f'{json.dumps(name)}: {json.dumps(logits[name])}' for name in sorted(logits)]
    wanted[LOGITS] = '{\n' + ',\n'.join(lines) + '\n}\n'
    status = 0
    for path, text in wanted.items():
        before = path.read_text(encoding='utf-8') if path.exists() else ''
        if args.write:
            path.write_text(text, encoding='utf-8')
        else:
            status |= print_difference(before, text, str(path))
    return status


if __name__ == '__main__':
    sys.exit(main())
