"""Decoding of image files: formats that are named here, from regular files, up to a size."""
import os
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from cpool_vision.reading import open_regular

# what image datasets come in; Pillow would also start Ghostscript for PostScript, and knows some forty more
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
MAX_PIXELS = 178_956_970  # where Pillow itself refuses by default: half a gigabyte as RGB


def open_image(source: str | os.PathLike[str] | IO[bytes], mode: str = 'RGB') -> Image.Image:
    """Decodes an image whole.

    Args:
        source: path, or an open file, which is left open.
        mode: Pillow's mode to convert to.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is none of `FORMATS`.
        ValueError: larger than `MAX_PIXELS`, or a mode that there is not.
        SyntaxError, EOFError, struct.error, Image.DecompressionBombError: damaged, as Pillow says it.
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
    """Lets `Image.open` know `FORMATS` only, in this process, for readers of other packages that call it themselves."""
    Image.init()  # all, so that no call loads more later
    Image.ID[:] = [each for each in Image.ID if each in FORMATS]


def load_image(path: str) -> Image.Image:
    """`open_image` as torchvision's sets take it for a loader."""
    return open_image(path)


def guard_images(dataset: Any) -> None:
    """Lets a set of another package decode with `open_image` or, where it has no such hook, under `limit_formats`."""
    if hasattr(dataset, 'loader') and callable(dataset.loader):
        dataset.loader = load_image
    else:
        limit_formats()
