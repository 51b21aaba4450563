import pathlib

import pytest

import cpool_vision
from benchmarks import model_table
from benchmarks.markers import replace_between
from benchmarks.model_table import MARKER, PAGE, Row, format_table, measure

BEGIN, END = f'<!-- {MARKER} -->', f'<!-- /{MARKER} -->'


def test_base_counts_are_those_of_the_plain_architecture() -> None:
    size, params, macs = model_table.count('resnet18_cpool', cpool_positions=[])
    assert (size, params) == (224, 11_689_512)
    assert macs == pytest.approx(1.814e9, rel=1e-3)  # He et al. (2016) give 1.8 billion
    assert model_table.count('resnet18')[1:] == (params, macs)


def test_attention_products_are_counted() -> None:
    row = measure('vit_micro_cpool_patch4_32')
    # six blocks of width 128 on 64 tokens: 12 d^2 per token, and 2 n d for scores and sums
    blocks = 6 * 64 * (12 * 128 ** 2 + 2 * 64 * 128)
    assert row.base_macs == blocks + 64 * 48 * 128 + 128 * 10
    assert row.macs > row.base_macs and row.params > row.base_params


def test_table_goes_between_the_markers(tmp_path: pathlib.Path) -> None:
    table = format_table([Row('name', 32, 1_000_000, 1_010_000, 10 ** 9, 15 * 10 ** 8)])
    assert '| `name` | 32 | 1.01 | 1.00 | +1.0 % | 1.500 | 1.000 | +50.0 % |' in table
    text = replace_between(f'before\n{BEGIN}\nold\n{END}\nafter\n', BEGIN, END, table)
    assert text == f'before\n{BEGIN}\n{table}\n{END}\nafter\n'
    assert replace_between(text, BEGIN, END, table) == text
    for bad in ('', BEGIN, f'{END}{BEGIN}', f'{BEGIN}{BEGIN}{END}'):
        with pytest.raises(ValueError, match='must hold'):
            replace_between(bad, BEGIN, END, table)


def test_check_sees_a_stale_table(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpool_vision, 'list_models', lambda: ['resnet_micro_cpool_32'])
    file = tmp_path / 'page.md'
    file.write_text(f'{BEGIN}\n{END}\n')
    arguments = ['--file', str(file)]
    assert model_table.main([*arguments, '--check']) == 1
    assert model_table.main([*arguments, '--write']) == 0
    assert model_table.main([*arguments, '--check']) == 0


def test_the_page_names_every_variant() -> None:
    text = PAGE.read_text(encoding='utf-8')
    table = text[text.index(BEGIN):text.index(END)]
    rows = [line.split('`')[1] for line in table.splitlines() if line.startswith('| `')]
    assert rows == cpool_vision.list_models()


@pytest.mark.slow
def test_the_page_holds_the_measured_table() -> None:
    assert model_table.main(['--check']) == 0
