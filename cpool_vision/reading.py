"""Reading files that others made: regular files only, bounded in size and depth, and never code."""
import io
import json
import os
import stat
from typing import Any, BinaryIO

import yaml

SETTINGS_BYTES = 1 << 20  # of a file of settings: thousands of times what train.py writes
TABLE_BYTES = 256 << 20  # of a table of a run: some five million log lines
_YAML_NODES = 100_000  # scalars, lists and mappings of a YAML file once its aliases are written out


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading; a pipe, a device or a folder is an error at once, where `open` might wait.

    Raises:
        OSError: the operating system refused, or it is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(None, 'not a regular file', os.fspath(path))
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


def open_text(path: str | os.PathLike[str], **kwargs: Any) -> io.TextIOWrapper:
    """`open_regular` for text; arguments as of `io.TextIOWrapper`.

    Raises:
        OSError: see `open_regular`.
    """
    return io.TextIOWrapper(open_regular(path), **kwargs)


def read_bytes(path: str | os.PathLike[str], limit: int = SETTINGS_BYTES) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        OSError: see `open_regular`.
        ValueError: the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f'larger than {limit} bytes')
    return content


def read_json(path: str | os.PathLike[str], limit: int = SETTINGS_BYTES) -> Any:
    """Value of a JSON file.

    Raises:
        OSError: see `open_regular`.
        ValueError: too large, not UTF-8, or not JSON.
    """
    try:
        return json.loads(read_bytes(path, limit).decode())
    except RecursionError as error:
        raise ValueError('nested too deeply') from error


def read_yaml(path: str | os.PathLike[str], limit: int = SETTINGS_BYTES) -> Any:
    """Value of a YAML file, by `yaml.safe_load`; aliases may not blow it up or refer to what contains them.

    Raises:
        OSError: see `open_regular`.
        ValueError: too large, not UTF-8, or not YAML.
    """
    text = read_bytes(path, limit).decode()
    try:
        if '*' in text:  # without aliases nothing can grow
            _count_nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(' '.join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    except (AttributeError, KeyError, TypeError) as error:  # PyYAML on timestamps and numbers that are none
        raise ValueError(f'a value that cannot be understood ({error})') from error


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """How many nodes a node stands for with its aliases written out."""
    if id(node) not in known:
        known[id(node)] = -1  # under way
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else \
            node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_count_nodes(child, known) for child in children)
    count = known[id(node)]
    if count < 0:
        raise ValueError('an alias refers to what contains it')
    if count > _YAML_NODES:
        raise ValueError(f'its aliases stand for more than {_YAML_NODES} values')
    return count


def reason(error: BaseException, length: int = 200) -> str:
    """What an error says, in one line, without the name of the file that the caller's own message has."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ' '.join(text.split())[:length] or type(error).__name__


def one_line(text: str) -> str:
    """A name for logs and lists: control characters, which could forge a line, are written as escapes."""
    return ''.join(repr(each)[1:-1] if ord(each) < 32 or each in '\x7f\x85\u2028\u2029' else each for each in text)
