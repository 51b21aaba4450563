import base64
import html.parser
import io
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from cpool_vision.inspect.canvas import new_figure
from cpool_vision.inspect.report import Report

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
VOID = {'meta', 'img', 'br', 'link'}


class Page(html.parser.HTMLParser):
    """What a page holds; fails at tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images: list[Image.Image] = []
        self.text = ''
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ('src', 'href', 'srcset', 'data', 'action', 'poster', 'background'):
                kind, _, data = value.partition(';base64,')
                if tag == 'img' and kind == 'data:image/png':
                    self.images.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert('RGB'))
                else:
                    self.addresses.append(value)
            assert not name.startswith('on')

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == 'style':
            self.addresses += re.findall(r'url\(|@import|https?:', data)
        else:
            self.text += data


def check_page(text: str) -> Page:
    """Parses a page and insists that it needs nothing else."""
    page = Page(text)
    assert page.addresses == [] and not {'script', 'link', 'iframe', 'object', 'embed'} & set(page.tags)
    assert all(np.asarray(image).std() > 5 for image in page.images)
    return page


def example() -> str:
    figure = new_figure(3, 2)
    figure.add_axes((0, 0, 1, 1)).imshow(np.eye(5), cmap='viridis', aspect='auto')
    report = Report('a <b> & "c"', 'lead')
    report.section('Numbers', '1 < 2')
    report.table(('name', 'x'), [('<i>', 1.23456789), ('n', 7)], 'caption')
    report.table(('', ''), [('k', None)], folded='more')
    report.figure(figure, 'eye & "eye"', dpi=60)
    return report.html()


def test_page_is_whole_and_escaped() -> None:
    page = check_page(example())
    assert [image.size for image in page.images] == [(180, 120)]
    for text in ('a <b> & "c"', '1 < 2', '<i>', '1.235', 'caption', 'eye & "eye"', 'more'):
        assert text in page.text
    assert not {'b', 'i'} & set(page.tags) and page.tags.count('thead') == 1


@pytest.mark.parametrize('bad', [
    '<img src="https://example.org/x.png">', '<script></script>', '<link rel="stylesheet" href="x.css">',
    '<style>p { background: url(x.png) }</style>', '<div>', '<p onclick="x()"></p>', '<a href="x.html">x</a>'])
def test_the_check_finds_what_a_page_must_not_have(bad: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        check_page(example().replace('</body>', bad + '</body>'))


def browse(page: pathlib.Path, height: int = 900) -> np.ndarray:
    """What Chromium shows of a page, without any network: `(height, 800, 3)` int."""
    if CHROMIUM is None:
        pytest.skip('no Chromium is installed')
    picture = page.with_suffix('.screen.png')
    command = [
        CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
        f'--user-data-dir={page.parent}/chrome', '--host-resolver-rules=MAP * ~NOTFOUND',
        f'--window-size=800,{height}', f'--screenshot={picture}', page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
    assert picture.exists(), result.stderr
    return np.asarray(Image.open(picture).convert('RGB')).astype(int)


def pixels_of(shown: np.ndarray, color: tuple[int, int, int]) -> int:
    """Number of pixels of nearly a color."""
    return int((abs(shown - color).sum(-1) < 12).sum())


def test_chromium_shows_the_page(tmp_path: pathlib.Path) -> None:
    page = tmp_path / 'page.html'
    page.write_text(example(), encoding='utf-8')
    shown = browse(page)
    # the two colors of the picture, at the size that the page gives it: 389 x 259 pixels, a fifth of them yellow
    assert pixels_of(shown, (68, 1, 84)) == pytest.approx(0.8 * 389 * 259, rel=0.15)
    assert pixels_of(shown, (253, 231, 37)) == pytest.approx(0.2 * 389 * 259, rel=0.15)
