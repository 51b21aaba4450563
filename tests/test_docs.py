"""Every Python block of the documentation runs, every page is in the site's navigation, every link leads somewhere."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / 'docs').rglob('*.md'))
BLOCK = re.compile(r'^```python\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\((?!https?:|#|mailto:)([^)#\s]+)')
WITH_BLOCKS = [page for page in (ROOT / 'README.md', *PAGES) if BLOCK.search(page.read_text(encoding='utf-8'))]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """What the pages take for granted: weights to download, images, a file of predictions."""
    create = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        return create(name, pretrained=pretrained and name.startswith('local-dir:'), **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_model)
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / 'p.npz', topk_index=np.array([[1], [0]]), topk_prob=np.array([[.9], [.8]]),
             target=np.array([0, 0]), filename=np.array(['a.jpg', 'b.jpg']), class_name=np.array(['cat', 'dog']))
    return {'__name__': 'page', 'images': torch.randn(1, 3, 224, 224)}


@pytest.mark.parametrize('page', WITH_BLOCKS, ids=lambda page: page.name)
def test_blocks_run(page, offline):
    torch.manual_seed(0)
    text = page.read_text(encoding='utf-8')
    for match in BLOCK.finditer(text):
        line = text[:match.start()].count('\n') + 2
        code = compile('\n' * (line - 1) + match[1], str(page), 'exec')
        exec(code, offline)  # noqa: S102  the project's own pages


def test_pages_with_blocks_are_found():
    assert {'README.md', 'models.md', 'retrofit.md', 'inspection.md'} <= {page.name for page in WITH_BLOCKS}


def pages_of(entries):
    """Pages of a navigation, in order."""
    for entry in entries:
        for page in entry.values():
            yield from [page] if isinstance(page, str) else pages_of(page)


def test_navigation_holds_every_page():
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))
    assert sorted(pages_of(site['nav'])) == sorted(page.relative_to(ROOT / 'docs').as_posix() for page in PAGES)


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip('mkdocs')
    pytest.importorskip('material')
    pytest.importorskip('mkdocstrings')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert built.returncode == 0, built.stderr[-2000:]
    assert 'context_pool2d' in (tmp_path / 'api' / 'ops' / 'index.html').read_text(encoding='utf-8')


def test_zensical_builds_the_same_site(tmp_path):
    pytest.importorskip('zensical')
    pytest.importorskip('mkdocstrings')
    shutil.copy(ROOT / 'mkdocs.yml', tmp_path)
    for name in ('docs', 'cpool_vision'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    built = subprocess.run(
        [sys.executable, '-m', 'zensical', 'build'], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0 and 'No issues found' in built.stdout + built.stderr, built.stdout + built.stderr
    assert 'context_pool2d' in (tmp_path / 'site' / 'api' / 'ops' / 'index.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding='utf-8')):
        assert (page.parent / target).exists(), f'{page.name} links to {target}, which does not exist'
