"""Decodes image files: known formats only, from regular files, up to a maximum size."""
import os
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from cpool_vision.reading import open_regular

# the formats of image datasets; Pillow knows some forty more, and would run Ghostscript for PostScript
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
MAX_PIXELS = 178_956_970  # Pillow's default limit: half a gigabyte as RGB


def open_image(source: str | os.PathLike[str] | IO[bytes], mode: str = 'RGB') -> Image.Image:
    """Decodes an image.

    Args:
        source: Path, or an open file, which is left open.
        mode: PIL mode to convert to.

    Raises:
        OSError: The file cannot be read, is not a regular file, or has none of the `FORMATS`.
        ValueError: The image is larger than `MAX_PIXELS`, or the mode is unknown.
        SyntaxError, EOFError, struct.error, Image.DecompressionBombError: The file is damaged; errors of Pillow.
    """
    if isinstance(source, (str, os.PathLike)):
        with open_regular(source) as file:
            return open_image(file, mode)
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f'cannot identify it as {", ".join(FORMATS[:-1])} or {FORMATS[-1]}') from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f'{image.width} x {image.height} pixels are more than {MAX_PIXELS}')
    return image.convert(mode)


def limit_formats() -> None:
    """Restricts `Image.open` to `FORMATS` in this process, for other packages that call it themselves."""
    Image.init()  # loads all formats, so that no later call adds more
    Image.ID[:] = [each for each in Image.ID if each in FORMATS]


def load_image(path: str) -> Image.Image:
    """`open_image` as a loader for torchvision's datasets."""
    return open_image(path)


def guard_images(dataset: Any) -> None:
    """Makes a dataset of another package decode images with `open_image` or, if it has no loader, `limit_formats`."""
    if hasattr(dataset, 'loader') and callable(dataset.loader):
        dataset.loader = load_image
    else:
        limit_formats()
