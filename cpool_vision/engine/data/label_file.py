"""Images of a folder with any number of labels each, from a CSV or JSON lines file."""
import csv
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.data.readers.class_map import load_class_map
from timm.data.readers.targets import get_field, has_field, parse_target_keys
from timm.utils import natural_key

from cpool_vision.data.folders import PathReader
from cpool_vision.errors import DatasetError, DatasetNotFoundError
from cpool_vision.reading import open_text, reason

NAMES = ('labels.csv', 'labels.jsonl', 'metadata.csv', 'metadata.jsonl')
SEPARATOR = '|'
_IMAGE_FIELD, _LABEL_FIELD = 'file_name', 'labels'  # those of Hugging Face's image folders
_SHOWN = 5
_SWITCHES = {'0': False, '0.0': False, 'false': False, '1': True, '1.0': True, 'true': True}  # as pandas writes them


def find_label_file(name: str, split: str, folders: Sequence[str]) -> str:
    """Path of a label file.

    Args:
        name: value of `--label-file`, '' for one of `NAMES`.
        split: name of the split, for which '{split}' stands.
        folders: where to look, in this order; the last resort is the working directory.

    Raises:
        DatasetNotFoundError: there is none.
        DatasetError: several of `NAMES`.
    """
    where = ' and '.join(repr(folder) for folder in dict.fromkeys(folders))
    if name:
        name = name.replace('{split}', split)
        for path in (*(os.path.join(folder, name) for folder in folders), name):
            if os.path.isfile(path):
                return path
        raise DatasetNotFoundError(f'--label-file {name!r} is neither in {where} nor a path: check the name')
    for folder in folders:
        found = [each for each in NAMES if os.path.isfile(os.path.join(folder, each))]
        if len(found) > 1:
            raise DatasetError(f'{folder!r} holds {" and ".join(found)}: choose one with --label-file')
        if found:
            return os.path.join(folder, found[0])
    raise DatasetNotFoundError(f'no labels in {where}: put {", ".join(NAMES[:-1])} or {NAMES[-1]} there, or name '
                               'another file with --label-file')


@dataclass(frozen=True)
class LabelTable:
    """What a label file says.

    Attributes:
        path: the file.
        images: paths of the images as written.
        labels: names or numbers of the labels of each.
        lines: where in the file each stands, from 1.
        columns: names of the labels where each has its own column.
    """

    path: str
    images: list[str] = field(default_factory=list)
    labels: list[list[Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    columns: list[str] | None = None

    def fault(self, line: int, text: str) -> DatasetError:
        """An error that names the line."""
        return DatasetError(f'{self.path!r}, line {line}: {text}')


def _switched_on(table: LabelTable, line: int, name: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in _SWITCHES:
        raise table.fault(line, f'{value!r} in {name!r} is neither 0 nor 1: fix it, or name the fields that are '
                                'labels with --target-key ONE,TWO,...')
    return _SWITCHES[text]


def _hot_indices(table: LabelTable, line: int, key: str, values: Any, num_classes: int) -> list[int]:
    if not isinstance(values, list) or len(values) != num_classes:
        raise table.fault(line, f'{key!r} must be a list of {num_classes} numbers, one per class, for --target-format '
                                'multihot: fix it, or set --num-classes')
    return [index for index, value in enumerate(values) if _switched_on(table, line, f'{key}[{index}]', value)]


def _csv_fields(header: Sequence[str], path: str, image_key: str | None, target_key: str | None,
                ) -> tuple[str, str, list[str] | None]:
    """Field of the image, field of the labels, and the fields that are labels themselves, if they are."""
    twice = next((name for index, name in enumerate(header) if name in header[:index] or not name), None)
    if twice is not None or len(header) < 2:
        raise DatasetError(f'{path!r}: the first line must name the columns, at least two and each once, got '
                           f'{", ".join(map(repr, header[:_SHOWN])) or "nothing"}: fix it')
    image = image_key or (_IMAGE_FIELD if _IMAGE_FIELD in header else header[0])
    others = [name for name in header if name != image]
    columns = parse_target_keys(target_key)
    if columns is None and not target_key and len(others) > 1 and _LABEL_FIELD not in others:
        columns = tuple(others)
    label = target_key if target_key and columns is None else _LABEL_FIELD if _LABEL_FIELD in others else others[0]
    missing = [name for name in (image, *(columns or (label,))) if name not in header]
    if missing:
        raise DatasetError(f'{path!r} has no column {missing[0]!r}: choose from the existing ones with --input-key and '
                           f'--target-key ({", ".join(header[:_SHOWN])}{", ..." if len(header) > _SHOWN else ""})')
    return image, label, None if columns is None else list(columns)


def _read_csv(path: str, image_key: str | None, target_key: str | None) -> LabelTable:
    with open_text(path, newline='', encoding='utf-8-sig') as file:  # Excel begins a file with a byte order mark
        reader = csv.reader(file, strict=True)
        header = [name.strip() for name in next(reader, [])]
        image, label, columns = _csv_fields(header, path, image_key, target_key)
        table = LabelTable(path, columns=columns)
        for cells in reader:
            line = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise table.fault(line, f'{len(cells)} cells for {len(header)} columns: fix the line')
            row = dict(zip(header, map(str.strip, cells), strict=True))
            if columns is None:
                labels: list[Any] = [part.strip() for part in row[label].split(SEPARATOR) if part.strip()]
            else:
                labels = [name for name in columns if _switched_on(table, line, name, row[name])]
            _add(table, line, row[image], labels)
    return table


def _read_json_lines(path: str, image_key: str | None, target_key: str | None, multihot: int) -> LabelTable:
    image, label = image_key or _IMAGE_FIELD, target_key or _LABEL_FIELD
    columns = parse_target_keys(target_key)
    table = LabelTable(path, columns=None if columns is None else list(columns))
    with open_text(path, encoding='utf-8-sig') as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise table.fault(line, f'not valid JSON ({error}): write one object per line') from error
            if not isinstance(row, dict):
                raise table.fault(line, f'expected an object, got {type(row).__name__}: write one object per line')
            missing = next((key for key in (image, *(columns or (label,))) if not has_field(row, key)), None)
            if missing is not None:
                raise table.fault(line, f'there is no field {missing!r}: choose another with --input-key '
                                        'and --target-key')
            if columns is not None:
                labels: Any = [name for name in columns if _switched_on(table, line, name, get_field(row, name))]
            else:
                labels = get_field(row, label)
                if multihot:
                    labels = _hot_indices(table, line, label, labels, multihot)
            if not isinstance(labels, list) or not all(type(each) in (str, int) for each in labels):
                raise table.fault(line, f'{label!r} must be a list of names or class numbers, got {labels!r:.60}: fix '
                                        'it')
            _add(table, line, get_field(row, image), labels)
    return table


def _add(table: LabelTable, line: int, image: Any, labels: list[Any]) -> None:
    if not isinstance(image, str) or not image:
        raise table.fault(line, f'{image!r} is not a file name: set the field of the images with --input-key')
    table.images.append(image)
    table.labels.append(labels)
    table.lines.append(line)


def read_label_file(path: str, image_key: str | None = None, target_key: str | None = None, multihot: int = 0,
                    ) -> LabelTable:
    """Reads a label file.

    A CSV file has one column for the images, and either one for their labels, separated by '|', or one of 0 and 1 for
    each label. A line of a JSON lines file is an object with a list of labels, names or class numbers.

    Args:
        path: the file, .csv or .jsonl.
        image_key: name of the field with the path of the image ('file_name', or else the first column, if left out).
        target_key: name of the field with the labels ('labels', or else all other columns), or several names, separated
            by commas, of fields that are 0 or 1 each.
        multihot: number of classes where JSON lines hold one number per class; 0 where they hold labels.

    Raises:
        DatasetError: unreadable or empty file, or a line that cannot be understood; it is named.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in ('.csv', '.jsonl'):
        raise DatasetError(f'--label-file {path!r}: the suffix must be .csv or .jsonl')
    if multihot and suffix == '.csv':
        raise DatasetError(f'--target-format multihot works with JSON lines, {path!r} has one column for each label or '
                           'for all: leave it out')
    try:
        if suffix == '.csv':
            table = _read_csv(path, image_key, target_key)
        else:
            table = _read_json_lines(path, image_key, target_key, multihot)
    except DatasetError:
        raise
    except (OSError, csv.Error, ValueError) as error:
        raise DatasetError(f'--label-file {path!r} cannot be read ({reason(error)}): check file and '
                           '--target-key') from error
    if not table.images:
        raise DatasetError(f'{path!r} lists no image: add some')
    return table


def _number_names(table: LabelTable, num_classes: int) -> dict[str, int]:
    """Numbers of the labels of a file that no class map numbers; none where they are numbers already."""
    if table.columns is not None:
        return {name: index for index, name in enumerate(table.columns)}
    known = {label for labels in table.labels for label in labels}
    texts = sorted((label for label in known if isinstance(label, str)), key=natural_key)
    if not texts or table.path.lower().endswith('.csv') and all(label.isdecimal() for label in texts):
        return {}
    if len(texts) < len(known):
        raise DatasetError(f'{table.path!r} mixes names ({texts[0]!r}) and numbers as labels: use one of them, '
                           'or name the classes with --class-map')
    if len(texts) != num_classes:
        raise DatasetError(f'{table.path!r} has {len(texts)} different labels, the model {num_classes} classes: set '
                           f'--num-classes {len(texts)}, or name all classes with --class-map FILE.txt, one per line')
    return {name: index for index, name in enumerate(texts)}


def _index_of(table: LabelTable, line: int, label: Any, classes: Mapping[str, int], num_classes: int) -> int:
    if isinstance(label, str) and label in classes:
        return classes[label]
    if isinstance(label, int) or not classes and label.isdecimal():
        if 0 <= int(label) < num_classes:
            return int(label)
        raise table.fault(line, f'{label} is not a class below {num_classes}: set --num-classes, or fix it')
    close = difflib.get_close_matches(label, classes, n=1)
    hint = f'did you mean {close[0]!r}?' if close else f'known are {next(iter(classes))!r} and {len(classes) - 1} more'
    raise table.fault(line, f'unknown label {label!r}: {hint} (the classes are those of --class-map, or of the '
                            'checkpoint or split before)')


class LabelFileReader(PathReader):
    """Reader of timm's `ImageDataset`: a sample is an image file and a list of class numbers, which may be empty.

    Args:
        path: label file, see `read_label_file`.
        root: folder that the paths of the images start from.
        num_classes: outputs of the model.
        class_map: file or mapping of names to numbers, as of timm; None or '' to number the names: columns in their
            order, others sorted, which then must be as many as the classes.
        image_key, target_key, multihot: see `read_label_file`.

    Attributes:
        samples: path and class numbers of each image, in the order of the file.
        class_to_idx: number of each label; empty where the file names none.

    Raises:
        DatasetError: see `read_label_file`; also an unknown label, an image listed twice, or one that does not exist.
    """

    def __init__(
            self,
            path: str,
            root: str,
            num_classes: int,
            class_map: Any = None,
            image_key: str | None = None,
            target_key: str | None = None,
            multihot: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        table = read_label_file(path, image_key, target_key, multihot)
        classes = load_class_map(class_map, root) if class_map else _number_names(table, num_classes)
        self.class_to_idx: dict[str, int] = dict(classes)
        self.samples = list(_place(table, root, classes, num_classes))

def _place(table: LabelTable, root: str, classes: Mapping[str, int], num_classes: int,
           ) -> Iterator[tuple[str, list[int]]]:
    """Path and sorted class numbers of each image."""
    first: dict[str, int] = {}
    absent: list[str] = []
    for image, labels, line in zip(table.images, table.labels, table.lines, strict=True):
        path = os.path.normpath(os.path.join(root, image))
        if path in first:
            raise table.fault(line, f'{image!r} is already listed in line {first[path]}: put all labels in one line')
        first[path] = line
        if not os.path.isfile(path):
            absent.append(image)
        yield path, sorted({_index_of(table, line, label, classes, num_classes) for label in labels})
    if absent:
        more = f' and {len(absent) - _SHOWN} more' if len(absent) > _SHOWN else ''
        raise DatasetNotFoundError(
            f'{len(absent)} of {len(first)} images of {table.path!r} do not exist in {root!r}: '
            f'{", ".join(absent[:_SHOWN])}{more}; restore them, or remove their lines')
