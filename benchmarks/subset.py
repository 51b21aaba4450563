"""Links the first or last N images of every class of an image folder: `python -m benchmarks.subset SRC DST -n N`.

The images of a class are taken in the order of their names, so that the subset is the same everywhere.
"""
import argparse
from pathlib import Path


def link_subset(source: Path, target: Path, per_class: int, last: bool = False) -> int:
    """Makes `target/CLASS/IMAGE` links to the first (or last) `per_class` images of every class of `source`.

    Returns:
        The number of images.

    Raises:
        FileNotFoundError: `source` has no class folders.
        FileExistsError: `target` exists.
        ValueError: a class has fewer images.
    """
    classes = sorted(p for p in source.iterdir() if p.is_dir())
    if not classes:
        raise FileNotFoundError(f'{source} has no class folders; name a folder laid out as CLASS/IMAGE')
    target.mkdir(parents=True)
    for folder in classes:
        images = sorted(p for p in folder.iterdir() if p.is_file())
        images = images[-per_class:] if last else images[:per_class]
        if len(images) < per_class:
            raise ValueError(f'{folder} has {len(images)} images, fewer than {per_class}; ask for fewer per class')
        (target / folder.name).mkdir()
        for image in images:
            (target / folder.name / image.name).symlink_to(image.resolve())
    return per_class * len(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path)
    parser.add_argument('-n', '--per-class', type=int, default=1000)
    parser.add_argument('--last', action='store_true', help='the last images by name, to hold them out')
    args = parser.parse_args()
    count = link_subset(args.source, args.target, args.per_class, args.last)
    print(f'{count} images in {args.target}')


if __name__ == '__main__':
    main()
