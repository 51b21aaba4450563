"""Cards, index and reference logits of the zoo: `python -m benchmarks.zoo --write`; without the flag says what differs.

An entry is a folder of models/ with `model.safetensors` and `config.json` in timm's format and `release.json`: how it
was made, what it scored, and what its twins scored. README.md of the entry, models/README.md and the table of
docs/results.md follow from these. Reference logits, of images that follow from a formula, are written for new entries
only: they are what later versions are held to.
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

from .markers import print_difference, replace_between
from .results import PLAIN

MODELS = Path(__file__).resolve().parents[1] / 'models'
RESULTS = MODELS.parent / 'docs' / 'results.md'
LOGITS = Path(__file__).resolve().parents[1] / 'tests' / 'models' / 'zoo_logits.json'
PHOTOGRAPHS = ('chelsea.png', 'coffee.png', 'rocket.jpg')  # of scikit-image, in the public domain
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

`{model}`: context pooling (Huang et al., ICML 2022, https://arxiv.org/abs/2207.01844) in a small network. This command
trained it from scratch on {data}:

```bash
{command}
```

Settings that differ from the defaults of `train.py`:

```
{flags}
```

| training images | epochs | parameters (M) | MACs (M) | validation images | top-1 (%) | top-5 (%) | loss |
|---|---|---|---|---|---|---|---|
| {train_images:,} | {epochs} | {params_m:.3f} | {macs_m:.1f} | {images:,} | {top1:.2f} | {top5:.2f} | {loss:.3f} |

This command scores the weights, which are those of the last epoch:

```bash
python validate.py --model local-dir:models/{name} --pretrained --data-dir DIR    # DIR/validation/CLASS/*
```

{limits}

{twins}

```python
import timm
import cpool_vision

model = timm.create_model('local-dir:models/{name}', pretrained=True).eval()
```

Input: {size} x {size} RGB, scaled to [0, 1], mean {mean}, standard deviation {std}. Labels are the class folders in
alphabetical order: {labels}.

In the picture, the radius of a circle is one standard deviation of the pooling mask. The weight map shows the binary
logarithm of each pixel's weight divided by the weight that it would have in a uniform map. The photographs are in the
public domain and come with scikit-image ([docs/inspection.md](../../docs/inspection.md) says where). This command draws
the picture:

```bash
{draw}
```

The weights are licensed under Apache-2.0.
'''

_TWINS = '''## Compared with its plain base and a depthwise convolution

The same recipe trained three networks on {data}: with context pools, with a depthwise 7x7 convolution in place of each
pool, and without either. Keywords that are left out have their defaults:

```bash
{command} [--model-kwargs KEYWORDS]
```

{table}

{train_images:,} images, {epochs} epochs, **one seed**, scored on {images:,} validation images at the last epoch. One
seed proves nothing: [docs/evidence.md](../../docs/evidence.md) compares smaller networks with six seeds.'''

_NO_TWINS = '''Not compared yet with its plain base and a depthwise convolution
([docs/results.md](../../docs/results.md) has the commands).
[docs/evidence.md](../../docs/evidence.md) compares smaller networks.'''

_TWIN_CELLS = "| in place of the pools | keywords | parameters (M) | MACs (M) | top-1 (%) | difference to plain |"
_TWIN_RULE = '|---|---|---:|---:|---:|---:|'

_INDEX = '''# Released models

One small model of each family, trained from scratch with the configs in this repository. They are demonstrations and
not meant for other images. After `import cpool_vision`, `timm.create_model('local-dir:models/NAME', pretrained=True)`
loads a folder; its card says how the model was trained and what it scores. `python -m benchmarks.zoo --write` writes
this page.

| model | data | epochs | parameters (M) | MACs (M) | top-1 (%) | weights (MB) |
|---|---|---:|---:|---:|---:|---:|
{rows}
'''


def entries() -> list[Path]:
    """Folders of the zoo, by name."""
    return sorted(path.parent for path in MODELS.glob('*/release.json'))


def draw_command(name: str) -> str:
    """The command that drew the picture of an entry."""
    images = ' '.join(f'PHOTOS/{image}' for image in PHOTOGRAPHS)
    return f'cpool-inspect local-dir:models/{name} {images} --layers 2 --dpi 110 -o models/{name}/supports.png'


def read_facts(folder: Path) -> dict[str, Any]:
    """How an entry was made and what it and its twins scored."""
    facts: dict[str, Any] = json.loads((folder / 'release.json').read_text(encoding='utf-8'))
    return facts


def twin_rows(twins: dict[str, Any]) -> list[str]:
    """A Markdown row for each twin: what differs, its size, what it scores, and that against the plain base."""
    base = next(row['top1'] for row in twins['rows'] if row['arm'] == PLAIN)
    rows = []
    for row in twins['rows']:
        keywords = ' '.join(f'{key}={json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value}'
                            for key, value in row['model_kwargs'].items())
        difference = '' if row['arm'] == PLAIN else f'{row["top1"] - base:+.2f}'
        rows.append(f'| {row["arm"]} | {keywords and f"`{keywords}`"} | {row["params"] / 1e6:.3f} '
                    f'| {row["macs"] / 1e6:.1f} | {row["top1"]:.2f} | {difference} |')
    return rows


def format_twins(facts: dict[str, Any]) -> str:
    """The section of a card on the twins of its model."""
    twins = facts.get('twins')
    if not twins:
        return _NO_TWINS
    lines = [_TWIN_CELLS, _TWIN_RULE, *twin_rows(twins)]
    return _TWINS.format(table='\n'.join(lines), **twins)


def results_table() -> str:
    """The twins of every entry, and which entries have none."""
    facts = {folder: read_facts(folder) for folder in entries()}
    lines = [f'| `{each["model"]}` | {each["twins"]["train_images"]:,} | {each["twins"]["epochs"]} {row}'
             for each in facts.values() if 'twins' in each for row in twin_rows(each['twins'])]
    if lines:
        lines = [f'| model | training images | epochs {_TWIN_CELLS}', f'|---|---:|---:{_TWIN_RULE}', *lines, '']
    without = [f'`{folder.name}`' for folder, each in facts.items() if 'twins' not in each]
    return '\n'.join([*lines, f'Not compared yet: {", ".join(without)}.'] if without else lines[:-1])


def card(folder: Path) -> str:
    """Contents of an entry's README.md."""
    facts = read_facts(folder)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    cfg = config['pretrained_cfg']
    return _CARD.format(
        name=folder.name, picture='supports.png', draw=draw_command(folder.name),
        flags='\n'.join(f'{key}: {value}' for key, value in facts['settings'].items()),
        params_m=facts['params'] / 1e6, macs_m=facts['macs'] / 1e6, size=cfg['input_size'][-1],
        twins=format_twins(facts), mean=cfg['mean'], std=cfg['std'], labels=', '.join(config['label_names']),
        **{key: facts[key] for key in (
            'model', 'data', 'command', 'limits', 'train_images', 'epochs', 'images', 'top1', 'top5', 'loss')})


def index() -> str:
    """Contents of models/README.md."""
    rows = []
    for folder in entries():
        facts = read_facts(folder)
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
    wanted[RESULTS] = replace_between(
        RESULTS.read_text(encoding='utf-8'), '<!-- twins -->', '<!-- /twins -->', results_table())
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
