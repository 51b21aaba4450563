"""Settings whose fields are the flags of a command line: each is declared once, with its default and its help."""
import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from timm.utils import ParseKwargs

from cpool_vision.version import __version__

from .limits import show_limits


def flag(default: Any, text: str, *names: str, **options: Any) -> Any:
    """A field of a settings class, and the flag --FIELD-NAME that sets it.

    Args:
        default: value without the flag.
        text: help.
        *names: further names of the flag; the field's own name, for one that keeps its underscore.
        **options: of `argparse`: metavar, choices, nargs, const; and `exclusive`, the same word for flags that exclude
            each other. The type follows from the annotation; tuples take one value or more.
    """
    metadata = {'help': text, 'names': names, **options}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. Frozen: what a run finds out, such as its device, lives in the objects that own it.

    Attributes:
        title: of the class's flags in --help.
        without: inherited settings that the command has no flag for.
    """

    title: ClassVar[str] = ''
    without: ClassVar[frozenset[str]] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """The settings by their names."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


def _argument(setting: dataclasses.Field[Any]) -> dict[str, Any]:
    """What `argparse` makes of a setting: by its type and default."""
    kind: Any = setting.type
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return {'action': 'store_true', 'default': False}
    if typing.get_origin(kind) is tuple:
        values: Any = setting.default
        return {'nargs': '+', 'type': typing.get_args(kind)[0], 'default': values if values is None else list(values)}
    if typing.get_origin(kind) is Mapping:
        return {'nargs': '*', 'action': ParseKwargs, 'default': {}}
    return {'type': kind, 'default': setting.default}


def _grouped(kind: type[Settings]) -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """Flags of a settings class and of its bases, by title; one that is declared twice counts where it comes first."""
    waiting = {each.name: each for each in dataclasses.fields(kind) if each.metadata and each.name not in kind.without}
    for part in kind.__mro__:
        own = [waiting.pop(name) for name in vars(part).get('__annotations__', ()) if name in waiting]
        if own:
            yield part.title, own  # type: ignore[attr-defined]


def build_parser(kind: type[Settings], prog: str, description: str, config: bool = False) -> argparse.ArgumentParser:
    """A fresh parser with every flag of a settings class.

    Args:
        kind: the class.
        prog, description: as of `argparse`.
        config: add `-c/--config`, which `engine.settings.config` reads.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add_version_arg(parser)
    if config:
        parser.add_argument(
            '-c', '--config', default='', type=str, metavar='NAME|FILE',
            help='name of a recipe in the package (list prints them), or YAML file whose keys are flag names; the '
                'command line overrides it')
    exclusive: dict[str, Any] = {}
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
            own = () if f'--{setting.name}' in names else (f'--{setting.name.replace("_", "-")}',)
            ordered = sorted((*own, *names), key=lambda name: name.startswith('--'))  # short ones first
            exclusive.get(choice, group).add_argument(*ordered, dest=setting.name, help=text, **options)
    show_limits(parser)
    return parser


def add_version_arg(parser: argparse.ArgumentParser) -> None:
    """`--version`: prints the version and exits."""
    parser.add_argument('--version', action='version', version=f'cpool_vision {__version__}',
                        help='print the version and exit')
