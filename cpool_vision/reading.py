"""Safe reading of untrusted files: regular files only, limited in size and depth, never executing code."""
import io
import json
import os
import stat
from typing import BinaryIO

import yaml

SETTINGS_BYTES = 1 << 20  # limit for settings files: thousands of times what train.py writes
TABLE_BYTES = 256 << 20  # limit for tables of a run: about five million log lines
_YAML_NODES = 100_000  # limit for scalars, lists and mappings of a YAML file, with aliases expanded


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading. Refuses pipes and devices, on which `open` could block, and folders.

    Raises:
        OSError: If the file cannot be opened or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(None, 'not a regular file', os.fspath(path))
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


def open_text(path: str | os.PathLike[str], encoding: str, errors: str = 'strict', newline: str | None = None,
              ) -> io.TextIOWrapper:
    """Opens a regular text file for reading; arguments as for `open`.

    Raises:
        OSError: See `open_regular`.
    """
    return io.TextIOWrapper(open_regular(path), encoding, errors, newline)


def read_bytes(path: str | os.PathLike[str], limit: int = SETTINGS_BYTES) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Raises:
        OSError: See `open_regular`.
        ValueError: If the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f'larger than {limit} bytes')
    return content


def read_json(path: str | os.PathLike[str], limit: int = SETTINGS_BYTES) -> object:
    """Reads a JSON file.

    Raises:
        OSError: See `open_regular`.
        ValueError: If the file is too large, not UTF-8, or not JSON.
    """
    try:
        return json.loads(read_bytes(path, limit).decode())
    except RecursionError as error:
        raise ValueError('nested too deeply') from error


def read_yaml(path: str | os.PathLike[str], limit: int = SETTINGS_BYTES) -> object:
    """Reads a YAML file with `yaml.safe_load`. Refuses recursive aliases, and aliases that expand to too many values.

    Raises:
        OSError: See `open_regular`.
        ValueError: If the file is too large, not UTF-8, or not YAML.
    """
    text = read_bytes(path, limit).decode()
    try:
        if '*' in text:  # only aliases make the value larger than the file
            _count_nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(' '.join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    except (AttributeError, KeyError, TypeError) as error:  # raised by PyYAML for malformed timestamps and numbers
        raise ValueError(f'a value cannot be parsed ({error})') from error


def _count_nodes(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Counts the nodes below and including a YAML node, with aliases expanded."""
    if id(node) not in known:
        known[id(node)] = -1  # being counted
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else \
            node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_count_nodes(child, known) for child in children)
    count = known[id(node)]
    if count < 0:
        raise ValueError('an alias refers to a node that contains it')
    if count > _YAML_NODES:
        raise ValueError(f'its aliases expand to more than {_YAML_NODES} values')
    return count


def reason(error: BaseException, length: int = 200) -> str:
    """Returns the message of an error as one line, without the file name, which the caller's message already has."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ' '.join(text.split())[:length] or type(error).__name__


def one_line(text: str) -> str:
    """Escapes control characters in a name for logs and lists, so that it cannot forge another line."""
    return ''.join(repr(each)[1:-1] if ord(each) < 32 or each in '\x7f\x85\u2028\u2029' else each for each in text)
