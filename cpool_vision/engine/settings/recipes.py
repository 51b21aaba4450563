"""Recipes of the package, which `--config NAME` finds by name."""
import difflib
import os
from pathlib import Path

from cpool_vision.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / 'configs'
LIST = 'list'  # --config list prints the recipes


def recipe_names() -> list[str]:
    """Returns the names of the recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob('*.yaml'))


def recipe_path(config: str) -> str:
    """Returns the path of the file that `--config` names. An existing file takes precedence over a recipe.

    Args:
        config: Path of a YAML file, or name of a recipe with or without `.yaml`.

    Raises:
        ConfigError: If there is no such file and no such recipe.
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
    """Lists the recipes, one per line: the name, and the first line of the comment in the file."""
    width = max(map(len, recipe_names()))
    lines = []
    for name in recipe_names():
        about = (FOLDER / f'{name}.yaml').read_text(encoding='utf-8').split('\n', 1)[0].lstrip('# ')
        lines.append(f'{name:{width}}  {about.rstrip(":")}')
    return '\n'.join(lines)
