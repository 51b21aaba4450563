"""Writes the reference of the public API from its docstrings: `python -m benchmarks.api_reference --write`.

Without `--write` it prints how docs/api.md differs and exits with status 1 if it does.
"""
import argparse
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .markers import print_difference

PAGE = Path(__file__).resolve().parent.parent / 'docs' / 'api.md'
# Modules with what is public in them; None stands for `__all__`.
MODULES: dict[str, tuple[str, ...] | None] = {
    'cpool_vision': ('add_context_pool', 'list_models'),
    'cpool_vision.ops': None,
    'cpool_vision.layers': None,
    'cpool_vision.models': None,
    'cpool_vision.retrofit': None,
    'cpool_vision.inspect': None,
    'cpool_vision.data': None,
    'cpool_vision.hub': ('save_for_hub',),
}


def public_names(module: ModuleType, names: tuple[str, ...] | None) -> list[str]:
    """Names of documented classes and functions, in the order of the module."""
    wanted = module.__all__ if names is None else names
    return [name for name in wanted if callable(getattr(module, name)) and inspect.getdoc(getattr(module, name))]


def _signature(thing: Any) -> str:
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return ''
    shown = []
    for name, parameter in parameters.items():
        prefix = {parameter.VAR_POSITIONAL: '*', parameter.VAR_KEYWORD: '**'}.get(parameter.kind, '')
        plain = isinstance(parameter.default, (int, float, str, bool, tuple, type(None)))
        default = '' if parameter.default is parameter.empty else f'={parameter.default!r}' if plain else '=...'
        shown.append(f'{prefix}{name}{default}')
    return ', '.join(shown)


def render() -> str:
    """The page, in Markdown."""
    lines = [
        '# API', '',
        'From the docstrings, by `python -m benchmarks.api_reference --write`. Everything else is private.']
    for name, names in MODULES.items():
        module = importlib.import_module(name)
        lines += ['', f'## {name}']
        for public in public_names(module, names):
            thing = getattr(module, public)
            text = f'{public}({_signature(thing)})\n\n{inspect.getdoc(thing)}'
            lines += ['', f'### {public}', '', '```text', text, '```']
    return '\n'.join(line.rstrip() for line in '\n'.join(lines).splitlines()) + '\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write the page')
    args = parser.parse_args()
    wanted = render()
    if args.write:
        PAGE.write_text(wanted, encoding='utf-8')
        return 0
    return print_difference(PAGE.read_text(encoding='utf-8'), wanted, PAGE.name)


if __name__ == '__main__':
    sys.exit(main())
