"""Settings classes whose fields are command line flags. A field declares the default and the help of its flag."""
import argparse
import copy
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from timm.utils import ParseKwargs

from cpool_vision.version import __version__

from .limits import flag_name, show_limits

_T = TypeVar('_T')


def flag(default: _T, text: str, *names: str, **options: object) -> _T:
    """Declares a field of a settings class and the flag --FIELD-NAME that sets it.

    The type of the flag follows from the annotation of the field; a tuple takes one or more values.

    Args:
        default: Default value.
        text: Help text.
        *names: More names of the flag. `--field_name` replaces `--field-name`; a bare field name makes a positional.
        **options: Options of `argparse.ArgumentParser.add_argument`: metavar, choices, nargs, const and type; and
            `exclusive`, a name shared by flags that exclude each other.
    """
    metadata = {'help': text, 'names': names, **options}
    if isinstance(default, dict):  # dataclasses refuse a mutable default
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of settings. Frozen: values that a run resolves, such as its device, belong to other objects.

    Attributes:
        title: Title of the class's flags in --help.
        without: Inherited settings without a flag.
    """

    title: ClassVar[str] = ''
    without: ClassVar[frozenset[str]] = frozenset()

    def as_dict(self) -> dict[str, object]:
        """Returns the settings by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


def _argument(setting: dataclasses.Field[object]) -> dict[str, Any]:
    """Returns the options of `add_argument` that follow from the type and the default of a setting."""
    kind = setting.type
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return {'action': 'store_true', 'default': False}
    if typing.get_origin(kind) is tuple:
        default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
        return {'nargs': '+', 'type': typing.get_args(kind)[0], 'default': default}
    if typing.get_origin(kind) is Mapping:
        return {'nargs': '*', 'action': ParseKwargs, 'default': {}}
    return {'type': kind, 'default': setting.default}


def _grouped(kind: type[Settings]) -> Iterator[tuple[str, list[dataclasses.Field[object]]]]:
    """Yields titles and flags of a settings class and its bases. A flag that is declared twice has the first title."""
    waiting = {each.name: each for each in dataclasses.fields(kind) if each.metadata and each.name not in kind.without}
    for part in kind.__mro__:
        own = [waiting.pop(name) for name in vars(part).get('__annotations__', ()) if name in waiting]
        if own:
            yield part.title, own  # type: ignore[attr-defined]


def build_parser(kind: type[Settings], prog: str, description: str, config: bool = False) -> argparse.ArgumentParser:
    """Returns a parser with every flag of a settings class.

    Args:
        kind: The settings class.
        prog: Name of the program.
        description: Description in --help.
        config: Whether to add `-c/--config`, which `engine.settings.config` reads.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add_version_arg(parser)
    if config:
        parser.add_argument(
            '-c', '--config', default='', type=str, metavar='NAME|FILE',
            help='recipe of the package by name (list prints the names), or YAML file whose keys are flag names; the '
                'command line overrides it')
    exclusive: dict[str, argparse._MutuallyExclusiveGroup] = {}
    for title, settings in _grouped(kind):
        group = parser.add_argument_group(title)
        for setting in settings:
            options = {**_argument(setting), **setting.metadata}
            names, text, choice = options.pop('names'), options.pop('help'), options.pop('exclusive', None)
            if options.get('nargs') == '?' and setting.name in names:
                parser.add_argument(setting.name, nargs='?', metavar=options['metavar'], help=text)
                continue
            if choice and choice not in exclusive:
                exclusive[choice] = group.add_mutually_exclusive_group()
            own = () if f'--{setting.name}' in names else (flag_name(setting.name),)
            ordered = sorted((*own, *names), key=lambda name: name.startswith('--'))  # short names first
            exclusive.get(choice, group).add_argument(*ordered, dest=setting.name, help=text, **options)
    show_limits(parser)
    return parser


def add_version_arg(parser: argparse.ArgumentParser) -> None:
    """Adds `--version`, which prints the version and exits."""
    parser.add_argument('--version', action='version', version=f'cpool_vision {__version__}',
                        help='print the version and exit')
