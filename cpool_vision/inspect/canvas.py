"""Shared parts of all figures: style, layout of panels, and writing files."""
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

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


def require_matplotlib() -> ModuleType:
    """Imports and returns matplotlib, with the submodules that figures need.

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
    """Creates an empty figure of a size in inches, without a window system."""
    matplotlib = require_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(width, height), **options)
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def show(axes: 'Axes', picture: NDArray[Any], size: tuple[int, int], **options: Any) -> 'AxesImage':
    """Shows a picture with axes in pixels of an image of `size` (height, width)."""
    shown = axes.imshow(picture, extent=(0, size[1], size[0], 0), interpolation='nearest', **options)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0), xticks=[], yticks=[])
    return shown


def check_images(images: NDArray[np.uint8], row_labels: Sequence[str] | None) -> None:
    """Checks that images are `(B, H, W, 3)` uint8 and that there are B labels, if any.

    Raises:
        ValueError: They are not.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f'images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}')
    if row_labels is not None and len(row_labels) != len(images):
        raise ValueError(f'got {len(row_labels)} row_labels for {len(images)} images')


class Sheet:
    """A figure with a grid of panels: a column for the image, `per_layer` columns per layer, and color bars below."""

    def __init__(self, rows: int, layers: int, aspect: float, per_layer: int = 3, cell: float = CELL) -> None:
        self.rows, self.cell, self.height = rows, cell, cell * aspect
        columns = 1 + per_layer * layers
        # in inches, with a wider gap between layers
        self.left = [_LEFT + i * (cell + GAP) + -(-i // per_layer) * 2 * GAP for i in range(columns)]
        self.width_in = self.left[-1] + cell + GAP
        self.height_in = _TOP + rows * (self.height + GAP) + _BOTTOM
        self.figure = new_figure(self.width_in, self.height_in)

    def _add(self, left: float, top: float, width: float, height: float) -> 'Axes':
        return self.figure.add_axes((
            left / self.width_in, 1 - (top + height) / self.height_in, width / self.width_in, height / self.height_in))

    def panel(self, row: int, column: int) -> 'Axes':
        """Adds the axes of a picture."""
        return self._add(self.left[column], _TOP + row * (self.height + GAP), self.cell, self.height)

    def bar(self, column: int, last: int | None = None) -> 'Axes':
        """Adds the axes of a color bar below a column, or below the columns up to `last`, at most two cells wide."""
        left, right = self.left[column], self.left[column if last is None else last] + self.cell
        width = min(right - left, 2 * CELL) - 0.12
        return self._add((left + right - width) / 2, self.height_in - _BOTTOM + 0.04, width, 0.07)

    def heading(self, first: int, last: int, text: str, weight: str) -> None:
        """Writes text above the columns `first` to `last - 1`, shrunk to fit; normal text goes below bold text."""
        x = (self.left[first] + self.left[last - 1] + self.cell) / 2 / self.width_in
        y = 1 - (_TOP - (0.06 if weight == 'normal' else 0.21)) / self.height_in
        written = self.figure.text(x, y, text, ha='center', va='bottom', fontweight=weight)
        extent = written.get_window_extent()
        _shrink(written, extent.width, (self.left[last - 1] + self.cell - self.left[first]) * self.figure.dpi)

    def label(self, axes: 'Axes', text: str) -> None:
        """Writes text beside a row, shrunk to fit."""
        axes.set_ylabel(text)
        _shrink(axes.yaxis.label, axes.yaxis.label.get_window_extent().height, self.height * self.figure.dpi)


def _shrink(text: 'Text', length: float, room: float) -> None:
    if length > room:
        text.set_fontsize(float(text.get_fontsize()) * room / length)


def check_suffix(path: str) -> None:
    """Checks that a figure can be saved as `path`, before anything is computed.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: matplotlib cannot write files with this suffix.
    """
    known = require_matplotlib().backends.backend_agg.FigureCanvasAgg.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in known:
        raise ValueError(f'cannot draw to {path!r}: its suffix must be one of {", ".join(sorted(known))}')


def save_figure(figure: 'Figure', path: str, dpi: int = 200) -> None:
    """Writes a figure atomically, in the format of the suffix (png, pdf, svg).

    Raises:
        ValueError: matplotlib cannot write files with this suffix.
        OSError: The folder cannot be written.
    """
    check_suffix(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with require_matplotlib().rc_context(STYLE):
        write_atomic(path, lambda file: figure.savefig(file, dpi=dpi, format=os.path.splitext(path)[1][1:].lower()))
