"""Command line and YAML: `--config` sets the parser's defaults, the command line wins, unknown keys are errors."""
import argparse
import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
_UNSET = object()
_S = TypeVar('_S', TrainSettings, ValidateSettings)


def read_yaml(path: str) -> dict[str, Any]:
    """Reads a YAML mapping with `yaml.safe_load`.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
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


def _convert_scalar(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type
    if kind is None or kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise ConfigError(f'{where}: {value!r} is not a string')
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return kind(value)  # type: ignore[operator]
    except (TypeError, ValueError):
        raise ConfigError(f'{where}: {value!r} is not of type {getattr(kind, "__name__", kind)}') from None


def convert_value(action: argparse.Action, value: Any, where: str) -> Any:
    """Checks a YAML value against the flag that it sets, as the command line would.

    Args:
        action: the flag.
        value: what the YAML file holds.
        where: name for messages, e.g. "key 'lr' in recipe.yaml".

    Returns:
        The value in the flag's type.

    Raises:
        ConfigError: wrong type, wrong number of values, or not one of the choices.
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
        result: Any = [_convert_scalar(action, item, where) for item in values]
    else:
        result = _convert_scalar(action, value, where)
    if action.choices is not None and result not in action.choices:
        raise ConfigError(f'{where}: {result!r} is not one of {", ".join(map(str, action.choices))}')
    return result


def yaml_defaults(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Settings of a YAML file, by the parser's destinations; dashes and aliases of flags are accepted as keys.

    Raises:
        ConfigError: no such file or recipe, a file that cannot be read, a key that is not a flag (close matches are
            named), or a value that does not fit.
    """
    actions = _actions_by_key(parser)
    settings: dict[str, Any] = {}
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
    """Parses a command line; settings of `--config` rank between the parser's defaults and the command line.

    `--config list` prints the recipes of the package and exits, as `--help` does.
    A `--device` that nobody asked for falls back to the CPU where there is no CUDA device, with a warning.

    Args:
        build_parser: makes a fresh parser.
        argv: arguments, those of the process if None.

    Returns:
        The namespace, without `config`.

    Raises:
        ConfigError: see `yaml_defaults` and `limits.check_limits`.
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
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)

    probe = build_parser()
    probe.set_defaults(**{action.dest: _UNSET for action in probe._actions if action.dest not in ('help', 'version')})
    given = {key for key, value in vars(probe.parse_args(argv)).items() if value is not _UNSET} | set(settings)
    if 'device' not in given and not torch.cuda.is_available():
        _logger.warning('No CUDA device is available: running on the CPU (--device cpu says so explicitly).')
        args.device = 'cpu'
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
    """Settings of a command line of train.py; see `parse_args`.

    Raises:
        ConfigError: see `yaml_defaults`.
    """
    settings = _read(TrainSettings, parse_args(train.build_parser, argv))
    if settings.multi_label and settings.eval_metric == 'top1':  # timm's default, which stands for no choice
        return dataclasses.replace(settings, eval_metric='map')
    return settings


def read_validate(argv: Sequence[str] | None = None) -> ValidateSettings:
    """Settings of a command line of validate.py; see `parse_args`."""
    return _read(ValidateSettings, parse_args(validate.build_parser, argv))
