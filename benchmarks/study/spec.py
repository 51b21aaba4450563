"""A study: named arms that differ in the model or the recipe, each trained with several seeds."""
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cpool_vision.engine.settings.recipes import recipe_path

_KEYS = {'title', 'base', 'config', 'flags', 'model', 'model_kwargs', 'seeds', 'arms', 'contrasts', 'equal_parameters'}
_ARM_KEYS = {'label', 'model', 'model_kwargs', 'flags', 'seeds', 'base'}
# Settings that the runner chooses for every run.
_OWN_FLAGS = {'config', 'model', 'model_kwargs', 'seed', 'output', 'experiment', 'resume', 'data_dir'}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a study.

    Attributes:
        name: Of the arm; runs are called NAME-sSEED.
        model: timm name.
        model_kwargs: Keywords of the model.
        flags: Settings of train.py by flag name, over those of the study's config.
        seeds: One run each.
        base: Arm that this one is compared with, None for a base.
        label: The arm in words, for tables and plots.
    """
    name: str
    model: str
    model_kwargs: dict[str, Any]
    flags: dict[str, Any]
    seeds: tuple[int, ...]
    base: str | None
    label: str = ''

    @property
    def title(self) -> str:
        return self.label or self.name


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms by name, in the order of the file, with the settings that all of them share.

    Attributes:
        title: Of tables and plots.
        arms: By name.
        settings: Of train.py, or of the recipe of a stacked study.
        contrasts: Pairs of arms whose difference is a question of the study.
        equal_parameters: Arms that must have as many parameters as one another, within 2 %.
    """
    title: str
    arms: dict[str, Arm]
    settings: dict[str, Any]
    contrasts: tuple[tuple[str, str], ...] = ()
    equal_parameters: tuple[str, ...] = ()

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every run, all arms of a seed before the next seed, so that what is done can be compared at any time."""
        seeds = sorted({seed for arm in self.arms.values() for seed in arm.seeds})
        for seed in seeds:
            for arm in self.arms.values():
                if seed in arm.seeds:
                    yield arm, seed

    def run_settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Contents of the `--config` file of a run."""
        return {
            **self.settings, **arm.flags, 'model': arm.model, 'model_kwargs': arm.model_kwargs, 'seed': seed}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f'{where} must be a mapping, got {value!r}')
    return value


def _check_keys(given: dict[str, Any], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}: choose from {', '.join(sorted(known))}")


def _flags(given: Any, where: str) -> dict[str, Any]:
    flags = _mapping(given, where)
    for key in flags:
        if key in _OWN_FLAGS:
            raise ValueError(f'{key!r} in {where} is set by the study itself: leave it out')
    return flags


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    seeds = tuple(given) if isinstance(given, list) else ()
    if not seeds or not all(isinstance(s, int) for s in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f'{where} must be a list of distinct integers, got {given!r}')
    return seeds


def read_study(path: Path) -> Study:
    """Reads a study from YAML.

    Keys of the file: `title`; `base`, the arm that the others are compared with; `config`, a recipe of the package
    by name or a YAML file of train.py's settings, and `flags` over it; `model`, `model_kwargs` and `seeds` of every
    arm; `contrasts`, pairs of arms to be compared; `equal_parameters`, arms of one size; `arms`, by name, each with a
    `label` in words, and `model`, `model_kwargs` (merged over the study's), `flags`, `seeds` or `base` of its own.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the config is unknown, a key is unknown or missing, or a value makes no sense.
    """
    raw = _mapping(yaml.safe_load(path.read_text(encoding='utf-8')), str(path))
    _check_keys(raw, _KEYS, str(path))
    arms = _mapping(raw.get('arms'), f'arms of {path}')
    if not arms:
        raise ValueError(f'{path} names no arms')
    settings: dict[str, Any] = {}
    if raw.get('config'):
        text = Path(recipe_path(str(raw['config']))).read_text(encoding='utf-8')
        settings = _mapping(yaml.safe_load(text), str(raw['config']))
    settings = {k: v for k, v in settings.items() if k not in _OWN_FLAGS}
    settings.update(_flags(raw.get('flags'), f'flags of {path}'))
    made = {}
    for name, given in arms.items():
        where = f'arm {name!r} of {path}'
        arm = _mapping(given, where)
        _check_keys(arm, _ARM_KEYS, where)
        model = arm.get('model', raw.get('model'))
        if not model:
            raise ValueError(f'{where} has no model: name one there or for the whole study')
        base = arm.get('base', raw.get('base'))
        if base not in arms:
            raise ValueError(f'base of {where} must be one of the arms, got {base!r}')
        made[name] = Arm(
            name, model,
            {**_mapping(raw.get('model_kwargs'), f'model_kwargs of {path}'),
             **_mapping(arm.get('model_kwargs'), f'model_kwargs of {where}')},
            _flags(arm.get('flags'), f'flags of {where}'),
            _seeds(arm.get('seeds', raw.get('seeds')), f'seeds of {where}'),
            None if base == name else base, str(arm.get('label', '')))
    contrasts = tuple(tuple(pair) for pair in raw.get('contrasts') or ())
    for pair in contrasts:
        if len(pair) != 2 or not set(pair) <= set(made):
            raise ValueError(f'contrasts of {path} must be pairs of arms, got {list(pair)!r}')
    equal = tuple(raw.get('equal_parameters') or ())
    for name in equal:
        if name not in made:
            raise ValueError(f'equal_parameters of {path} must be arms, got {name!r}')
    return Study(str(raw.get('title', path.stem)), made, settings, contrasts, equal)
