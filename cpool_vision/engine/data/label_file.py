"""Label files for multi-label classification: CSV or JSON lines with any number of labels per image."""
import csv
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from timm.data.readers.class_map import load_class_map
from timm.data.readers.targets import get_field, has_field, parse_target_keys
from timm.utils import natural_key

from cpool_vision.data.folders import PathReader
from cpool_vision.errors import DatasetError, DatasetNotFoundError
from cpool_vision.reading import open_text, reason

NAMES = ('labels.csv', 'labels.jsonl', 'metadata.csv', 'metadata.jsonl')
SEPARATOR = '|'
_IMAGE_FIELD, _LABEL_FIELD = 'file_name', 'labels'  # the names that Hugging Face's image folders use
_SHOWN = 5
_FLAGS = {'0': False, '0.0': False, 'false': False, '1': True, '1.0': True, 'true': True}  # as pandas writes them


def find_label_file(name: str, split: str, folders: Sequence[str]) -> str:
    """Finds the label file of a split and returns its path.

    Args:
        name: Value of `--label-file`, in which '{split}' is replaced by the split; '' to look for one of `NAMES`.
        split: Name of the split.
        folders: Folders to search, in this order. A `name` found in none of them is taken as a path.

    Raises:
        DatasetNotFoundError: There is no such file.
        DatasetError: A folder contains several of `NAMES`.
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
            raise DatasetError(f'{folder!r} contains {" and ".join(found)}: choose one with --label-file')
        if found:
            return os.path.join(folder, found[0])
    raise DatasetNotFoundError(f'no labels in {where}: put {", ".join(NAMES[:-1])} or {NAMES[-1]} there, or name '
                               'another file with --label-file')


@dataclass(frozen=True)
class LabelTable:
    """Content of a label file.

    Attributes:
        path: Path of the file.
        images: Paths of the images, as written in the file.
        labels: Labels of each image, as names or class indices.
        lines: Line number of each image, from 1.
        columns: Names of the label columns, if each label has its own column.
    """

    path: str
    images: list[str] = field(default_factory=list)
    labels: list[list[str | int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    columns: list[str] | None = None

    def fault(self, line: int, text: str) -> DatasetError:
        """Returns an error that names the line."""
        return DatasetError(f'{self.path!r}, line {line}: {text}')

    def add(self, line: int, image: object, labels: list[str | int]) -> None:
        """Appends an image.

        Raises:
            DatasetError: `image` is not a file name.
        """
        if not isinstance(image, str) or not image:
            raise self.fault(line, f'{image!r} is not a file name: name the field of the images with --input-key')
        self.images.append(image)
        self.labels.append(labels)
        self.lines.append(line)


def _is_set(table: LabelTable, line: int, name: str, value: object) -> bool:
    text = str(value).lower()
    if text not in _FLAGS:
        raise table.fault(line, f'{value!r} in {name!r} is neither 0 nor 1: fix it, or name the label fields with '
                                '--target-key ONE,TWO,...')
    return _FLAGS[text]


def _hot_indices(table: LabelTable, line: int, key: str, values: object, num_classes: int) -> list[str | int]:
    if not isinstance(values, list) or len(values) != num_classes:
        raise table.fault(line, f'{key!r} must be a list of {num_classes} numbers, one per class, for --target-format '
                                'multihot: fix it, or set --num-classes')
    return [index for index, value in enumerate(values) if _is_set(table, line, f'{key}[{index}]', value)]


def _csv_fields(header: Sequence[str], path: str, image_key: str | None, target_key: str | None,
                ) -> tuple[str, str, list[str] | None]:
    """Returns the image column, the label column, and the columns that are one label each (None if there are none)."""
    twice = next((name for index, name in enumerate(header) if name in header[:index] or not name), None)
    if twice is not None or len(header) < 2:
        raise DatasetError(f'{path!r}: the first line must name two or more different columns, got '
                           f'{", ".join(map(repr, header[:_SHOWN])) or "nothing"}: fix it')
    image = image_key or (_IMAGE_FIELD if _IMAGE_FIELD in header else header[0])
    others = [name for name in header if name != image]
    columns = parse_target_keys(target_key)
    if columns is None and not target_key and len(others) > 1 and _LABEL_FIELD not in others:
        columns = tuple(others)
    label = target_key if target_key and columns is None else _LABEL_FIELD if _LABEL_FIELD in others else others[0]
    missing = [name for name in (image, *(columns or (label,))) if name not in header]
    if missing:
        raise DatasetError(f'{path!r} has no column {missing[0]!r}: choose existing ones with --input-key and '
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
                labels: list[str | int] = [part.strip() for part in row[label].split(SEPARATOR) if part.strip()]
            else:
                labels = [name for name in columns if _is_set(table, line, name, row[name])]
            table.add(line, row[image], labels)
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
                raise table.fault(line, f'there is no field {missing!r}: name the fields with --input-key and '
                                        '--target-key')
            labels: object
            if columns is not None:
                labels = [name for name in columns if _is_set(table, line, name, get_field(row, name))]
            else:
                labels = get_field(row, label)
                if multihot:
                    labels = _hot_indices(table, line, label, labels, multihot)
            if not isinstance(labels, list) or not all(type(each) in (str, int) for each in labels):
                raise table.fault(line, f'{label!r} must be a list of names or class indices, got {labels!r:.60}: fix '
                                        'it')
            table.add(line, get_field(row, image), labels)
    return table


def read_label_file(path: str, image_key: str | None = None, target_key: str | None = None, multihot: int = 0,
                    ) -> LabelTable:
    """Reads a label file.

    A CSV file has a column with the path of the image and either one column with its labels, separated by '|', or one
    column of 0 and 1 per label. Each line of a JSON lines file is an object with the path of the image and a list of
    label names or class indices.

    Args:
        path: Path of the .csv or .jsonl file.
        image_key: Field with the path of the image. Defaults to 'file_name' or, in a CSV file without it, the first
            column.
        target_key: Field with the labels, or several fields, separated by commas, that are 0 or 1 each. Defaults to
            'labels' or, in a CSV file without it, all other columns.
        multihot: Number of classes if JSON lines hold one number per class; 0 if they hold labels.

    Raises:
        DatasetError: The file cannot be read, is empty, or has an invalid line, which the message names.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in ('.csv', '.jsonl'):
        raise DatasetError(f'--label-file {path!r}: the suffix must be .csv or .jsonl')
    if multihot and suffix == '.csv':
        raise DatasetError(f'--target-format multihot works with JSON lines only, not with {path!r}: leave it out')
    try:
        if suffix == '.csv':
            table = _read_csv(path, image_key, target_key)
        else:
            table = _read_json_lines(path, image_key, target_key, multihot)
    except DatasetError:
        raise
    except (OSError, csv.Error, ValueError) as error:
        raise DatasetError(f'--label-file {path!r} cannot be read ({reason(error)}): check the file and '
                           '--target-key') from error
    if not table.images:
        raise DatasetError(f'{path!r} lists no images: add some')
    return table


def _number_names(table: LabelTable, num_classes: int) -> dict[str, int]:
    """Returns the class index of each label name without a class map; empty if labels are class indices already."""
    if table.columns is not None:
        return {name: index for index, name in enumerate(table.columns)}
    known = {label for labels in table.labels for label in labels}
    texts = sorted((label for label in known if isinstance(label, str)), key=natural_key)
    if not texts or table.path.lower().endswith('.csv') and all(label.isdecimal() for label in texts):
        return {}
    if len(texts) < len(known):
        raise DatasetError(f'{table.path!r} mixes names ({texts[0]!r}) and numbers as labels: use one of the two, '
                           'or name the classes with --class-map')
    if len(texts) != num_classes:
        raise DatasetError(f'{table.path!r} has {len(texts)} different labels, but the model has {num_classes} '
                           f'classes: set --num-classes {len(texts)}, or name all classes with --class-map FILE.txt, '
                           'one per line')
    return {name: index for index, name in enumerate(texts)}


def _index_of(table: LabelTable, line: int, label: str | int, classes: Mapping[str, int], num_classes: int) -> int:
    if isinstance(label, str) and label in classes:
        return classes[label]
    if isinstance(label, int) or not classes and label.isdecimal():
        if 0 <= int(label) < num_classes:
            return int(label)
        raise table.fault(line, f'{label} is not a class index below {num_classes}: set --num-classes, or fix it')
    close = difflib.get_close_matches(label, classes, n=1)
    hint = f'did you mean {close[0]!r}?' if close else \
        f'known labels are {next(iter(classes))!r} and {len(classes) - 1} more'
    raise table.fault(line, f'unknown label {label!r}: {hint} (the classes are those of --class-map, of the checkpoint '
                            'or of the split loaded first)')


class LabelFileReader(PathReader):
    """Reader for timm's `ImageDataset`: a sample is an image file and a list of class indices, which may be empty.

    Args:
        path: Label file, see `read_label_file`.
        root: Folder that image paths are relative to.
        num_classes: Number of classes.
        class_map: File or mapping of label names to class indices, as in timm. Without one, label columns are numbered
            in order, and other label names in sorted order; there must be `num_classes` of these.
        image_key, target_key, multihot: See `read_label_file`.

    Attributes:
        samples: Path and class indices of each image, in the order of the file.
        class_to_idx: Class index of each label name; empty if labels are class indices.

    Raises:
        DatasetError: The file is invalid (see `read_label_file`), has an unknown label, lists an image twice, or lists
            one that does not exist.
    """

    def __init__(
            self,
            path: str,
            root: str,
            num_classes: int,
            class_map: str | Mapping[str, int] | None = None,
            image_key: str | None = None,
            target_key: str | None = None,
            multihot: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        table = read_label_file(path, image_key, target_key, multihot)
        classes = load_class_map(class_map, root) if class_map else _number_names(table, num_classes)
        self.class_to_idx: dict[str, int] = dict(classes)
        self.samples = list(_samples(table, root, classes, num_classes))


def _samples(table: LabelTable, root: str, classes: Mapping[str, int], num_classes: int,
             ) -> Iterator[tuple[str, list[int]]]:
    """Yields path and sorted class indices of each image."""
    first: dict[str, int] = {}
    absent: list[str] = []
    for image, labels, line in zip(table.images, table.labels, table.lines, strict=True):
        path = os.path.normpath(os.path.join(root, image))
        if path in first:
            raise table.fault(line, f'{image!r} is already listed in line {first[path]}: put all its labels in one '
                                    'line')
        first[path] = line
        if not os.path.isfile(path):
            absent.append(image)
        yield path, sorted({_index_of(table, line, label, classes, num_classes) for label in labels})
    if absent:
        more = f' and {len(absent) - _SHOWN} more' if len(absent) > _SHOWN else ''
        raise DatasetNotFoundError(
            f'{len(absent)} of {len(first)} images of {table.path!r} do not exist in {root!r}: '
            f'{", ".join(absent[:_SHOWN])}{more}; restore them, or remove their lines')
