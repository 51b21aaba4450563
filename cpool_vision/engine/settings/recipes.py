"""Recipes that come with the package: `--config NAME` finds them wherever the package is installed."""
import difflib
import os
from pathlib import Path

from cpool_vision.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / 'configs'
LIST = 'list'  # what --config takes to print the recipes


def recipe_names() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob('*.yaml'))


def recipe_path(config: str) -> str:
    """The file that `--config` names: a file of the user, which comes first, or a recipe of the package.

    Args:
        config: path of a YAML file, or the name of a recipe, with or without its suffix.

    Raises:
        ConfigError: neither; close names are suggested, or all are listed.
    """
    if os.path.exists(config) and not os.path.isdir(config):
        return config
    names = recipe_names()
    name = config.removesuffix('.yaml')
    if name in names:
        return str(FOLDER / f'{name}.yaml')
    close = difflib.get_close_matches(os.path.basename(name), names, n=3)
    hint = f'did you mean {" or ".join(close)}?' if close else f'choose a file, or one of {", ".join(names)}'
    raise ConfigError(f'--config {config!r} is neither a file nor a recipe of the package: {hint}')


def describe_recipes() -> str:
    """The recipes, one a line: name, and the first sentence of what the file says about itself."""
    width = max(map(len, recipe_names()))
    lines = []
    for name in recipe_names():
        about = (FOLDER / f'{name}.yaml').read_text(encoding='utf-8').split('\n', 1)[0].lstrip('# ')
        lines.append(f'{name:{width}}  {about.rstrip(":")}')
    return '\n'.join(lines)
