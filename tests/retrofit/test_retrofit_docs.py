import json
import pathlib

import pytest

import cpool_vision
from benchmarks import retrofit_sweep

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'retrofit.md'


def rows():
    return json.loads(retrofit_sweep.RESULTS.read_text(encoding='utf-8'))['rows']


def test_the_table_of_the_page_is_that_of_the_results():
    text = PAGE.read_text(encoding='utf-8')
    table = text.split(retrofit_sweep.BEGIN + '\n')[1].split('\n' + retrofit_sweep.END)[0]
    assert table == retrofit_sweep.format_table(rows())


def test_the_families_that_must_work_do():
    works = {row['module'] for row in rows() if row['status'] == 'works'}
    assert works >= {
        'vision_transformer', 'deit', 'eva', 'resnet', 'regnet', 'convnext', 'swin_transformer', 'metaformer',
        'efficientnet', 'mobilenetv3'}
    assert {row['module'] for row in rows()} == set(retrofit_sweep.timms_modules())
    assert all(row['reason'] for row in rows() if row['status'] != 'works')


def test_the_checks_of_the_sweep(monkeypatch):
    row = retrofit_sweep.check('test_mambaout', {})
    assert row['status'] == 'works' and row['layout'] == 'NHWC' and row['pools'] == len(row['places'])

    def with_pools_open(model):
        real(model, init='paper')

    real = cpool_vision.add_context_pool
    monkeypatch.setattr(cpool_vision, 'add_context_pool', with_pools_open)
    with pytest.raises(retrofit_sweep.CheckError, match='not equal to the bit'):
        retrofit_sweep.check('test_resnet', {})


def test_failures_and_slow_models_get_a_row(monkeypatch):
    row = {'model': 'test_resnet', 'kwargs': {'nonsense': 1}, 'params': 1}
    answer = retrofit_sweep.run(row, 60)
    assert answer['status'] == 'fails' and 'nonsense' in answer['reason']
    answer = retrofit_sweep.run({**row, 'kwargs': {}}, 0.0)
    assert answer['status'] == 'fails' and answer['reason'] == 'no answer within 0 s'
