"""Pictures of what each augmentation makes of an image, and their times beside timm's transforms.

    python -m benchmarks.augmentation -o SHEET.png                   # the built-in images
    python -m benchmarks.augmentation -o SHEET.png --images DIR      # images of a folder, at any depth
    python -m benchmarks.augmentation --time --images DIR [--write]  # times; --write: into docs/augmentation.md

Rows of the sheet are pipelines, columns draws: the first shows the image itself. Both pipelines give uint8 for timm's
prefetcher. Times are of one thread, in rounds in which all pipelines take turns; a ratio is the median over the rounds
of (images per second of the pipeline / those of timm's default). "With decoding" begins at the JPEG file in memory.
"""
import argparse
import functools
import io
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform

from cpool_vision.data import ShapesDataset
from cpool_vision.data.augment import Pipeline
from cpool_vision.data.augment_config import list_presets
from cpool_vision.data.images import open_image
from cpool_vision.engine.data.keyed import DrawnSeeds, seed_generators
from cpool_vision.engine.data.posterize import allow_zero_bits

from .markers import write_between

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs' / 'augmentation.md'
BEGIN, END = '<!-- augmentation-times -->', '<!-- /augmentation-times -->'
ENDINGS = ('.jpg', '.jpeg', '.png', '.webp')
TIMM: dict[str, dict[str, Any]] = {
    'timm, default': {},
    'timm, --aa rand-m9-mstd0.5-inc1': {'auto_augment': 'rand-m9-mstd0.5-inc1'},
}
Transform = Callable[[Image.Image], Any]


def make_transforms(size: int, sources: list[str]) -> dict[str, Transform]:
    """timm's pipelines as train.py makes them, and those of presets and files, by name."""
    allow_zero_bits()
    made: dict[str, Transform] = {
        name: create_transform(size, is_training=True, use_prefetcher=True, color_jitter=0.4, interpolation='random',
                               **options) for name, options in TIMM.items()}
    for source in sources:
        made[f'--aug-config {source}'] = DrawnSeeds(Pipeline(source).build((3, size, size)))
    return made


def find_images(folder: pathlib.Path | None, count: int, size: int) -> list[bytes]:
    """Image files in memory, evenly spread over a folder; without one, JPEGs of the built-in images."""
    if folder is None:
        shapes, files = ShapesDataset('validation', num_samples=count, image_size=size), []
        for index in range(count):
            file = io.BytesIO()
            shapes[index][0].save(file, 'JPEG', quality=95)
            files.append(file.getvalue())
        return files
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in ENDINGS)
    if not paths:
        raise FileNotFoundError(f'{folder} holds no images ({", ".join(ENDINGS)}): name another folder')
    return [paths[index * len(paths) // count].read_bytes() for index in range(min(count, len(paths)))]


def decode(file: bytes) -> Image.Image:
    """The image of a file."""
    return open_image(io.BytesIO(file))


def draw_sheet(transforms: dict[str, Transform], images: list[Image.Image], size: int, draws: int) -> Image.Image:
    """Sheet of pipelines (rows) by images and draws (columns)."""
    gap, head = 4, 16
    columns = len(images) * (draws + 1)
    sheet = Image.new('RGB', (columns * (size + gap) + gap, len(transforms) * (size + gap + head) + gap), 'white')
    pen = ImageDraw.Draw(sheet)
    for row, (name, transform) in enumerate(transforms.items()):
        top = gap + row * (size + gap + head)
        pen.text((gap, top), name, fill='black')
        for place, image in enumerate(images):
            left = gap + place * (draws + 1) * (size + gap)
            fitted = image.copy()
            fitted.thumbnail((size, size))
            sheet.paste(fitted, (left, top + head))
            for number in range(draws):
                seed_generators(1000 * place + number)
                pixels = np.asarray(transform(image)).transpose(1, 2, 0)
                sheet.paste(Image.fromarray(pixels), (left + (number + 1) * (size + gap), top + head))
    return sheet


def _decode_and(transform: Transform, file: bytes) -> Any:
    return transform(decode(file))


def time_all(transforms: dict[str, Transform], files: list[bytes], rounds: int) -> list[tuple[str, float, float]]:
    """Name, images per second with decoding and without, both over those of the first transform."""
    images = [decode(file) for file in files]
    cases: list[tuple[Callable[[Any], Any], list[Any]]] = []
    for transform in transforms.values():
        cases += [(functools.partial(_decode_and, transform), files), (transform, images)]
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):
        order = list(range(len(cases)))
        random.Random(number).shuffle(order)  # noqa: S311
        for case in order:
            seed_generators(number)
            function, inputs = cases[case]
            begin = time.perf_counter()
            for each in inputs:
                function(each)
            if number:  # the first round warms up
                seconds[case].append(time.perf_counter() - begin)
    ratios = [statistics.median(base / here for base, here in zip(seconds[case % 2], mine, strict=True))
              for case, mine in enumerate(seconds)]
    return [(name, ratios[2 * place], ratios[2 * place + 1]) for place, name in enumerate(transforms)]


def format_table(rows: list[tuple[str, float, float]]) -> str:
    """Markdown table of `time_all`."""
    lines = ['| pipeline | images/s with decoding, ratio | images/s without, ratio |', '|---|---|---|']
    return '\n'.join(lines + [f'| {name} | {whole:.2f} | {alone:.2f} |' for name, whole, alone in rows])


def main(argv: list[str] | None = None) -> int:
    """Draws or times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='*', default=list_presets(), help='presets or files (default: all presets)')
    parser.add_argument('--images', type=pathlib.Path, default=None, help='folder of images')
    parser.add_argument('-o', '--output', type=pathlib.Path, default=None, help='picture to draw')
    parser.add_argument('--size', type=int, default=None, help='side of the input (default: 96 to draw, 224 to time)')
    parser.add_argument('--count', type=int, default=None, help='images (default: 2 to draw, 100 to time)')
    parser.add_argument('--draws', type=int, default=6, help='draws per image (default: 6)')
    parser.add_argument('--time', action='store_true', help='time the pipelines')
    parser.add_argument('--rounds', type=int, default=5, help='of timing (default: 5)')
    parser.add_argument('--write', action='store_true', help=f'put the times into {DOCS.relative_to(ROOT)}')
    args = parser.parse_args(argv)
    if not args.time and args.output is None:
        parser.error('nothing to do: give --output or --time')
    if args.output is not None:
        size = args.size or 96
        images = [decode(file) for file in find_images(args.images, args.count or 2, size)]
        sheet = draw_sheet(make_transforms(size, args.sources), images, size, args.draws)
        sheet.save(args.output, optimize=True)
        print(args.output)
    if args.time:
        torch.set_num_threads(1)
        size = args.size or 224
        files = find_images(args.images, args.count or 100, size)
        table = format_table(time_all(make_transforms(size, args.sources), files, args.rounds))
        print(table)
        if args.write:
            write_between(DOCS, BEGIN, END, table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
