"""HTML reports in a single file, with embedded figures and without scripts or external links."""
import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .canvas import STYLE, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = '''
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #ddd; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { color: #555; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .7rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .22rem .7rem .22rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid #999; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .85rem; margin-top: .4rem; max-width: 46rem; }
summary { cursor: pointer; color: #0059a8; }
@media print { body { margin: 0; max-width: none; } figure, table { break-inside: avoid; } }
'''


_TEXT = ' class="text"'


def _cell(value: object, digits: int) -> str:
    if isinstance(value, float):
        return f'<td>{html.escape(f"{value:.{digits}g}")}</td>'
    kind = '' if isinstance(value, int) and not isinstance(value, bool) else _TEXT
    return f'<td{kind}>{html.escape("" if value is None else str(value))}</td>'


class Report:
    """An HTML report, built section by section.

    Args:
        title: Title of the page.
        lead: Line below the title.
    """

    def __init__(self, title: str, lead: str = '') -> None:
        self._title = html.escape(title)
        self._parts = [f'<h1>{self._title}</h1>']
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def section(self, heading: str, text: str = '') -> None:
        """Starts a section."""
        self._parts.append(f'<h2>{html.escape(heading)}</h2>')
        if text:
            self._parts.append(f'<p>{html.escape(text)}</p>')

    def table(
            self, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = '', digits: int = 4,
            folded: str = '',
    ) -> None:
        """Adds a table.

        Args:
            columns: Column headings.
            rows: Values, row by row.
            caption: Text above the table.
            digits: Significant digits of floats.
            folded: If set, the table is hidden until the reader clicks on this text.
        """
        rows = list(rows)
        numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
        head = ''.join(f'<th scope="col"{"" if right else _TEXT}>{html.escape(column)}</th>'
                       for column, right in zip(columns, numeric, strict=True))
        head = f'<thead><tr>{head}</tr></thead>\n' if any(columns) else ''
        body = '\n'.join(f'<tr>{"".join(_cell(value, digits) for value in row)}</tr>' for row in rows)
        caption = f'<caption>{html.escape(caption)}</caption>' if caption else ''
        table = (f'<div class="wide"><table>{caption}{head}<tbody>\n{body}\n</tbody>'
                 '</table></div>')
        if folded:
            table = f'<details><summary>{html.escape(folded)}</summary>{table}</details>'
        self._parts.append(table)

    def figure(self, figure: 'Figure', caption: str, dpi: int = 150) -> None:
        """Adds a figure with a caption; it is shown at its own size, or narrower if the page is."""
        file = io.BytesIO()
        with require_matplotlib().rc_context(STYLE):
            figure.savefig(file, format='png', dpi=dpi)
        width, height = (round(1.35 * 96 * inches) for inches in figure.get_size_inches())
        data, text = base64.b64encode(file.getvalue()).decode(), html.escape(caption)
        self._parts.append(f'<figure><img alt="{text}" width="{width}" height="{height}" '
                           f'src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>')

    def html(self) -> str:
        """Returns the page as HTML."""
        return '\n'.join([
            '<!DOCTYPE html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{self._title}</title>', f'<style>{_CSS}</style>', '</head>', '<body>', *self._parts, '</body>',
            '</html>', ''])
