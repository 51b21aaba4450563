"""Writes results files (JSON, CSV with timm's columns, or Markdown) and predictions (.npz)."""
import csv
import io
import json
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.utilities.distributed import gather_all_tensors

from cpool_vision.errors import ConfigError, OutputError
from cpool_vision.files import write_atomic, write_text

from ..data.multi_label import unreadable_rows
from ..data.unreadable import UNREADABLE
from .results_markdown import format_markdown
from .results_rows import Row

FORMATS = ('csv', 'json', 'md')
# suffixes of formats that are not written
_FOREIGN = frozenset('xlsx xls ods parquet feather html htm tex yaml yml xml pdf pkl npz npy h5 db sqlite tsv'.split())


def results_format(path: str, kind: str) -> str:
    """Returns the format of a results file: csv, json or md by its suffix, or `kind` for other suffixes.

    Raises:
        ConfigError: The format is unknown or contradicts the suffix.
    """
    if kind not in FORMATS:
        raise ConfigError(f'--results-format {kind!r} is unknown: choose {", ".join(FORMATS)}')
    suffix = os.path.splitext(path)[1][1:].lower()
    if suffix in _FOREIGN:
        raise ConfigError(f'--results-file {path!r}: .{suffix} is not supported; use .{", .".join(FORMATS)}')
    if suffix not in FORMATS:
        return kind
    if kind not in ('csv', suffix):  # csv is the default
        raise ConfigError(f'--results-format {kind} contradicts --results-file {path!r}: drop it, or change the suffix')
    return suffix


def check_writable(path: str, flag: str) -> None:
    """Checks that a file can be written, before the work that leads to it.

    Raises:
        OutputError: The folder does not exist or is not writable, or the path is a folder.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise OutputError(f'{flag} {path!r} cannot be written: choose a file in an existing, writable folder')


def scalars(row: Row) -> Row:
    """Returns the single values of a row, without dictionaries and lists."""
    return {key: value for key, value in row.items() if not isinstance(value, (dict, list))}


def table(results: Row | Sequence[Row]) -> list[Row]:
    """Returns the lines of a CSV table: one per row, followed by one per corruption and severity."""
    lines: list[Row] = []
    for row in [results] if isinstance(results, dict) else results:
        lines.append(scalars(row))
        lines += [{'model': row['model'], **each} for each in row.get('corruptions', [])]
    return lines


def finite(value: object) -> object:
    """Replaces NaN and infinity, which JSON lacks, by None in nested values."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(path: str, results: Row | Sequence[Row], kind: str = 'csv') -> None:
    """Writes a results file atomically. Rows may have different columns.

    Args:
        path: The file; an existing one is replaced.
        results: A row or several.
        kind: csv, json or md.

    Raises:
        OutputError: The file cannot be written; an existing one is left intact.
    """
    if kind == 'json':
        text = json.dumps(finite(results), indent=4, allow_nan=False) + '\n'
    elif kind == 'md':
        text = format_markdown([results] if isinstance(results, dict) else list(results))
    else:
        rows = table(results)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    write_text(path, text, errors='surrogateescape')


class Predictions:
    """Collects the predictions for each image.

    Args:
        top_k: Number of classes to keep per image, with their probabilities; 0 to keep all logits.
        device: Device for communication with other processes.
        multi_label: Probabilities are sigmoids, and targets are labels `(B, C)`.
    """

    def __init__(self, top_k: int, device: torch.device, multi_label: bool = False) -> None:
        self.top_k, self.device, self.multi_label = top_k, device, multi_label
        self.parts: dict[str, list[torch.Tensor]] = {}

    def update(self, output: torch.Tensor, target: torch.Tensor, positions: list[int]) -> None:
        """Adds a batch of logits `(B, C)`, targets, and the indices of the images."""
        output = output.detach().float()
        if self.top_k:
            prob = output.sigmoid() if self.multi_label else output.softmax(dim=-1)
            prob, index = prob.topk(min(self.top_k, output.shape[-1]), dim=-1)
            columns = {'topk_index': index, 'topk_prob': prob}
        else:
            columns = {'logits': output}
        if self.multi_label:
            target = torch.where(unreadable_rows(target)[:, None], UNREADABLE, target.ge(0.5)).to(torch.int8)
        else:
            target = target.long()
        columns |= {'target': target, 'position': torch.tensor(positions, dtype=torch.long)}
        for name, column in columns.items():
            self.parts.setdefault(name, []).append(column.cpu())

    def gather(self, distributed: bool) -> dict[str, np.ndarray]:
        """Returns the predictions of all processes, in the order of the dataset. Every process must call it.

        Returns:
            `target` `(N,)` int64, or `(N, C)` int8 with several labels; `position` `(N,)` int64; and either `logits`
            `(N, C)` float32, or `topk_index` `(N, k)` int64 and `topk_prob` `(N, k)` float32.
        """
        columns = {name: torch.cat(parts) for name, parts in self.parts.items()}
        if distributed:
            columns = {name: torch.cat([part.cpu() for part in gather_all_tensors(column.to(self.device))])
                       for name, column in columns.items()}
        order = columns['position'].argsort()
        return {name: column[order].numpy() for name, column in columns.items()}


def write_predictions(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays of numbers and text as a compressed .npz, which `np.load` reads without pickle.

    Raises:
        OutputError: The file cannot be written; an existing one is left intact.
    """
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
