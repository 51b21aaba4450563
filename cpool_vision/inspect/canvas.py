"""What the pictures have in common: style, panels at exact places, and writing them whole."""
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    'font.family': 'sans-serif',
    'font.size': 7,
    'axes.labelsize': 7,
    'axes.titlesize': 7,
    'axes.linewidth': 0.5,
    'xtick.labelsize': 6,
    'ytick.labelsize': 6,
    'xtick.major.width': 0.5,
    'ytick.major.width': 0.5,
    'xtick.major.size': 2,
    'ytick.major.size': 2,
    'legend.fontsize': 6,
    'legend.frameon': False,
    'pdf.fonttype': 42,
    'svg.fonttype': 'none',
}
# inches
CELL, GAP = 1.15, 0.05
_LEFT, _TOP, _BOTTOM = 0.22, 0.42, 0.45


class PlotDependencyError(ImportError):
    """matplotlib is not installed."""


def require_matplotlib() -> Any:
    """matplotlib with what a figure needs, imported on first use.

    Raises:
        PlotDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.patches
        import matplotlib.ticker
    except ImportError as error:
        raise PlotDependencyError("drawing needs matplotlib: pip install 'cpool_vision[plot]'") from error
    return matplotlib


def new_figure(width: float, height: float, **options: Any) -> 'Figure':
    """An empty figure of a size in inches that no window system knows of."""
    matplotlib = require_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(width, height), **options)
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def show(axes: Any, picture: NDArray[Any], size: tuple[int, int], **options: Any) -> Any:
    """Shows a picture so that its axes count pixels of an image of `size` (height, width)."""
    shown = axes.imshow(picture, extent=(0, size[1], size[0], 0), interpolation='nearest', **options)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0), xticks=[], yticks=[])
    return shown


def check_images(images: NDArray[np.uint8], row_labels: Sequence[str] | None) -> None:
    """Insists on `(B, H, W, 3)` uint8 images and as many labels, if any.

    Raises:
        ValueError: they are not.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f'images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}')
    if row_labels is not None and len(row_labels) != len(images):
        raise ValueError(f'got {len(row_labels)} row_labels for {len(images)} images')


class Sheet:
    """A figure with panels at exact places: one column for the image, then some a layer, color bars underneath."""

    def __init__(self, rows: int, layers: int, aspect: float, per_layer: int = 3, cell: float = CELL) -> None:
        self.rows, self.cell, self.height = rows, cell, cell * aspect
        columns = 1 + per_layer * layers
        # inches: each layer stands a little apart
        self.left = [_LEFT + i * (cell + GAP) + -(-i // per_layer) * 2 * GAP for i in range(columns)]
        self.width_in = self.left[-1] + cell + GAP
        self.height_in = _TOP + rows * (self.height + GAP) + _BOTTOM
        self.figure = new_figure(self.width_in, self.height_in)

    def _add(self, left: float, top: float, width: float, height: float) -> Any:
        return self.figure.add_axes((
            left / self.width_in, 1 - (top + height) / self.height_in, width / self.width_in, height / self.height_in))

    def panel(self, row: int, column: int) -> Any:
        """Axes of one picture."""
        return self._add(self.left[column], _TOP + row * (self.height + GAP), self.cell, self.height)

    def bar(self, column: int, last: int | None = None) -> Any:
        """Axes of a color bar under a column, or in the middle under the columns to `last`, two cells wide at most."""
        left, right = self.left[column], self.left[column if last is None else last] + self.cell
        width = min(right - left, 2 * CELL) - 0.12
        return self._add((left + right - width) / 2, self.height_in - _BOTTOM + 0.04, width, 0.07)

    def heading(self, first: int, last: int, text: str, weight: str) -> None:
        """Text over the columns `first` to `last - 1`, made smaller to fit; the normal weight stands below the bold."""
        x = (self.left[first] + self.left[last - 1] + self.cell) / 2 / self.width_in
        y = 1 - (_TOP - (0.06 if weight == 'normal' else 0.21)) / self.height_in
        written = self.figure.text(x, y, text, ha='center', va='bottom', fontweight=weight)
        extent = written.get_window_extent()
        _shrink(written, extent.width, (self.left[last - 1] + self.cell - self.left[first]) * self.figure.dpi)

    def label(self, axes: Any, text: str) -> None:
        """Text beside a row, made smaller to fit."""
        axes.set_ylabel(text)
        _shrink(axes.yaxis.label, axes.yaxis.label.get_window_extent().height, self.height * self.figure.dpi)


def _shrink(text: Any, length: float, room: float) -> None:
    if length > room:
        text.set_fontsize(text.get_fontsize() * room / length)


def check_suffix(path: str) -> None:
    """Raises what drawing into `path` would raise, before anything is computed.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: matplotlib does not write files of this suffix.
    """
    known = require_matplotlib().backends.backend_agg.FigureCanvasAgg.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in known:
        raise ValueError(f'cannot draw into {path!r}: its suffix must be one of {", ".join(sorted(known))}')


def save_figure(figure: 'Figure', path: str, dpi: int = 200) -> None:
    """Writes a figure in the format of the suffix (png, pdf, svg); an earlier file is replaced only by a whole new one.

    Raises:
        ValueError: matplotlib does not write files of this suffix.
        OSError: the folder cannot be written.
    """
    check_suffix(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with require_matplotlib().rc_context(STYLE):
        write_atomic(path, lambda file: figure.savefig(file, dpi=dpi, format=os.path.splitext(path)[1][1:].lower()))
