"""Reads settings from the command line and from YAML. The command line overrides the YAML file of `--config`."""
import argparse
import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from timm.utils import ParseKwargs

from cpool_vision import reading
from cpool_vision.errors import ConfigError

from . import train, validate
from .limits import check_limits
from .recipes import LIST, describe_recipes, recipe_path
from .train import TrainSettings
from .validate import ValidateSettings

_logger = logging.getLogger(__name__)
_S = TypeVar('_S', TrainSettings, ValidateSettings)


def read_yaml(path: str) -> dict[str, object]:
    """Reads a YAML file that maps flags to values.

    Raises:
        ConfigError: If the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = reading.read_yaml(path)
    except OSError as error:
        raise ConfigError(f'--config {path!r} cannot be read ({error.strerror}): check the path') from error
    except ValueError as error:
        where = reading.reason(error, 400)
        raise ConfigError(f'--config {path!r} is not valid YAML ({where}): fix the file') from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f'--config {path!r} holds a {type(content).__name__}: it must map flags to values')
    return {str(key): value for key, value in content.items()}


def _actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    keys: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest not in ('help', 'version', 'config'):
            keys[action.dest] = action
            keys.update({flag.lstrip('-').replace('-', '_'): action for flag in action.option_strings
                         if flag.startswith('--')})
    return keys


def _convert_scalar(action: argparse.Action, value: object, where: str) -> object:
    kind = action.type
    if kind is str or not callable(kind):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise ConfigError(f'{where}: {value!r} is not a string')
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return kind(str(value))
    except (TypeError, ValueError):
        raise ConfigError(f'{where}: {value!r} is not of type {getattr(kind, "__name__", kind)}') from None


def convert_value(action: argparse.Action, value: object, where: str) -> object:
    """Converts a YAML value to the type of the flag that it sets.

    Args:
        action: The flag.
        value: Value from the YAML file.
        where: Name of the key for messages, e.g. "key 'lr' in recipe.yaml".

    Returns:
        The converted value.

    Raises:
        ConfigError: If the type or the number of values is wrong, or the value is not one of the choices.
    """
    if value is None:
        if action.default is None or action.dest == 'data':
            return None
        if action.type is str or action.type is None and action.nargs is None:
            return ''
        raise ConfigError(f'{where}: the value is empty; give one, or remove the key')
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise ConfigError(f'{where}: {value!r} is not true or false')
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise ConfigError(f'{where}: {value!r} is not a mapping of names to values')
        return value
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs or not values and action.default != []:
            raise ConfigError(f'{where}: {value!r} has {len(values)} values, the flag takes {action.nargs}')
        result: object = [_convert_scalar(action, item, where) for item in values]
    else:
        result = _convert_scalar(action, value, where)
    if action.choices is not None and result not in action.choices:
        raise ConfigError(f'{where}: {result!r} is not one of {", ".join(map(str, action.choices))}')
    return result


def yaml_defaults(parser: argparse.ArgumentParser, path: str) -> dict[str, object]:
    """Reads the settings of a recipe or a YAML file. Keys may contain dashes or be aliases of a flag.

    Returns:
        Values by the parser's destinations.

    Raises:
        ConfigError: If the file cannot be found or read, a key is not a flag, or a value is invalid.
    """
    actions = _actions_by_key(parser)
    settings: dict[str, object] = {}
    path = recipe_path(path)
    for key, value in read_yaml(path).items():
        name = key.replace('-', '_')
        if name not in actions:
            close = difflib.get_close_matches(name, actions, n=3)
            hint = f'did you mean {" or ".join(close)}?' if close else 'see --help for the flags'
            raise ConfigError(f'unknown key {key!r} in --config {path!r}: {hint}')
        action = actions[name]
        if action.dest in settings:
            raise ConfigError(f'key {key!r} in --config {path!r} sets {action.dest!r} a second time: keep one')
        settings[action.dest] = convert_value(action, value, f'key {key!r} in --config {path!r}')
    return settings


def parse_args(build_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None = None,
               ) -> argparse.Namespace:
    """Parses a command line. `--config` overrides the parser's defaults, and the command line overrides `--config`.

    `--config list` prints the recipes of the package and exits. Without `--device` and without a CUDA device, the CPU
    is used, with a warning.

    Args:
        build_parser: Returns a parser with a `--device` flag.
        argv: Arguments, or None for those of the process.

    Returns:
        The namespace, without `config`.

    Raises:
        ConfigError: See `yaml_defaults` and `limits.check_limits`.
    """
    parser = build_parser()
    has_config = any(action.dest == 'config' for action in parser._actions)
    path = ''
    if has_config:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument('-c', '--config', default='')
        path = first.parse_known_args(argv)[0].config
    if path == LIST and not os.path.exists(path):
        print(describe_recipes())
        parser.exit()
    settings = yaml_defaults(parser, path) if path else {}
    parser.set_defaults(**{'device': None, **settings})
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if args.device == 'cpu':
            _logger.warning('No CUDA device is available: running on the CPU (add --device cpu to hide this warning).')
    if has_config:
        del args.config
    check_limits(args)
    return args


def _read(kind: type[_S], args: argparse.Namespace) -> _S:
    values = vars(args)
    named = {each.name: values[each.name] for each in dataclasses.fields(kind) if each.name in values}
    named = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    if named.get('data') and not named.get('data_dir'):
        named['data_dir'] = named['data']
    return kind(**named)


def read_train(argv: Sequence[str] | None = None) -> TrainSettings:
    """Reads the settings of train.py from a command line; see `parse_args`.

    Raises:
        ConfigError: See `parse_args`.
    """
    settings = _read(TrainSettings, parse_args(train.build_parser, argv))
    if settings.multi_label and settings.eval_metric == 'top1':  # timm's default, so the user chose none
        return dataclasses.replace(settings, eval_metric='map')
    return settings


def read_validate(argv: Sequence[str] | None = None) -> ValidateSettings:
    """Reads the settings of validate.py from a command line; see `parse_args`.

    Raises:
        ConfigError: See `parse_args`.
    """
    return _read(ValidateSettings, parse_args(validate.build_parser, argv))
