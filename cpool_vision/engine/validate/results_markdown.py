"""Formats results as Markdown."""
import math
from collections.abc import Iterable, Sequence

from .results_rows import Row

_WORST = 10


def _number(value: object, digits: int = 2) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return '-'
    return f'{value:.{digits}f}' if isinstance(value, float) else f'{value}'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |' for line in lines)


def _interval(row: Row, name: str) -> str:
    text = _number(row.get(name))
    if row.get(f'{name}_low') is None:
        return text
    return f'{text} ({_number(row[f"{name}_low"])} to {_number(row[f"{name}_high"])})'


def _models(rows: Sequence[Row]) -> str:
    head = ['model', 'images', 'top-1 % (95 %)', 'top-5 % (95 %)', 'macro %', 'NLL', 'ECE %', 'Brier', 'not finite',
            'parameters (M)', 'input']
    return _table(head, [[
        row.get('checkpoint') or row['model'], _number(row.get('images')), _interval(row, 'top1'),
        _interval(row, 'top5'), _number(row.get('macro_accuracy')), _number(row.get('nll'), 4), _number(row.get('ece')),
        _number(row.get('brier'), 4), _number(row.get('nonfinite')), _number(row.get('param_count')),
        _number(row.get('img_size'))] for row in rows])


def _label_models(rows: Sequence[Row]) -> str:
    columns = {'images': 'images', 'map': 'mAP %', 'micro_map': 'micro AP %', 'micro_f1': 'micro F1 %',
               'macro_f1': 'macro F1 %', 'micro_precision': 'precision %', 'micro_recall': 'recall %',
               'exact_match': 'exact match %', 'bce': 'BCE', 'nonfinite': 'not finite', 'threshold': 'threshold',
               'param_count': 'parameters (M)', 'img_size': 'input'}
    return _table(['model', *columns.values()], [[
        row.get('checkpoint') or row['model'],
        *(_number(row.get(name), 4 if name == 'bce' else 2) for name in columns)] for row in rows])


def _label_details(row: Row) -> Iterable[str]:
    classes = [each for each in row.get('per_class', []) if each['images']]
    if classes:
        worst = sorted(classes, key=lambda each: each['ap'])[:_WORST]
        yield f'### Lowest average precision of {len(classes)} labels'
        yield _table(['label', 'images', 'predicted', 'AP %', 'precision %', 'recall %', 'F1 %'], [
            [each['name'], *(_number(each[key]) for key in ('images', 'predicted', 'ap', 'precision', 'recall', 'f1'))]
            for each in worst])


def _details(row: Row) -> Iterable[str]:
    classes = [each for each in row.get('per_class', []) if each['images']]
    if 'map' in row:
        yield from _label_details(row)
    elif classes:
        worst = sorted(classes, key=lambda each: each['accuracy'])[:_WORST]
        yield f'### Least accurate of {len(classes)} classes'
        yield _table(['class', 'images', 'accuracy %'],
                     [[each['name'], _number(each['images']), _number(each['accuracy'])] for each in worst])
    if row.get('top_confusions'):
        yield '### Most frequent confusions'
        yield _table(['true', 'predicted', 'images', '% of the true class'],
                     [[each['true'], each['predicted'], _number(each['images']), _number(each['share'])]
                      for each in row['top_confusions']])
    bins = [each for each in row.get('reliability', []) if each['images']]
    if bins:
        yield '### Calibration'
        yield _table(['confidence %', 'images', 'mean confidence %', 'accuracy %'],
                     [[f'{each["low"]:.1f} to {each["high"]:.1f}', _number(each['images']),
                       _number(each['confidence']), _number(each['accuracy'])] for each in bins])
    if row.get('corruptions'):
        severities = list(dict.fromkeys(each['severity'] for each in row['corruptions']))
        names = list(dict.fromkeys(each['corruption'] for each in row['corruptions']))
        found = {(each['corruption'], each['severity']): each['top1'] for each in row['corruptions']}
        means = row['corruption_means']
        yield '### Top-1 % under corruption'
        yield _table(['corruption', *severities, 'mean'], [
            *([name, *(_number(found.get((name, severity))) for severity in severities),
               _number(means['by_corruption'][name])] for name in names),
            ['mean', *(_number(means['by_severity'][severity]) for severity in severities), _number(row['top1'])]])
    if row.get('cost'):
        yield '### Cost'
        yield _table(['figure', 'value'], [[key, _number(value)] for key, value in row['cost'].items()])


def format_markdown(rows: Sequence[Row]) -> str:
    """Formats rows as a table, followed by details (classes, confusions, calibration, cost) if there is only one."""
    parts = ['## Validation', _label_models(rows) if 'map' in rows[0] else _models(rows)]
    if len(rows) == 1:
        parts += _details(rows[0])
    return '\n\n'.join(parts) + '\n'
