"""Adds context pools to an existing model: `add_context_pool`."""
import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers import context_pools
from ..models._family import as_tuple
from .attach import attach, detach
from .places import POSITIONS, Finder, NoPlaceError, Place
from .pools import GridContextPool, create_pool, follow_images, unfollow_images
from .probe import equal, finite, in_raster_order, probe_image, reaches_output, run, runs_children

_logger = logging.getLogger(__name__)

ARCHITECTURE = 'contextpool_retrofit'
# In finer stages, maps have so many pixels that a pool can cost more than the rest of the stage.
MIN_REDUCTION = 8
# The values for columnar networks are measured in docs/evidence_details.md, the others are not.
COLUMNAR_RATIO, STAGED_RATIO = 0.25, 0.1
COLUMNAR_GROUPS, STAGED_GROUPS = 16, 1


def _choose(model: nn.Module, finder: Finder, size: tuple[int, int], positions: tuple | None,
            stages: tuple | None) -> list[Place]:
    if positions is None:
        if not finder.columnar:
            positions = ('post_stage',)
        else:
            positions = ('pre_attn',) if finder.places('pre_attn') else ('post_block',)
    for position in positions:
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}: choose from {', '.join(POSITIONS)}")
    if not positions:
        raise ValueError(f"positions is empty: choose from {', '.join(POSITIONS)}")
    count = len(finder.stages)
    for stage in stages or ():
        if not isinstance(stage, int) or not 0 <= stage < count:
            raise ValueError(f'stages must be among 0 to {count - 1} for {type(model).__name__}, got {stage!r}')
    found = {position: finder.places(position) for position in positions}
    for position, places in found.items():
        if not places:
            others = [other for other in POSITIONS if other not in positions and finder.places(other)]
            raise NoPlaceError(f'{type(model).__name__} has no place {position!r}: ' + (
                f"choose from {', '.join(others)}" if others else
                'none of its modules returns a map (B, C, H, W), (B, H, W, C) or a grid of tokens; add ContextPool2d '
                'to the network by hand'))
    places = [place for each in found.values() for place in each]
    if stages is not None:
        places = [place for place in places if place.stage in stages]
    else:
        coarse = [place for place in places if size[0] / place.features.grid[0] > MIN_REDUCTION - 1]
        places = coarse or places
        # in a columnar network, only the head reads the output of the last block
        if finder.columnar and len(places) > 1:
            places = [place for place in places if place.side == 'input' or place.name != finder.stages[-1]]
    unique = {place.name: place for place in places}
    if not unique:
        raise NoPlaceError(f'{type(model).__name__} has no place {positions} in stages {stages}: choose other stages')
    return list(unique.values())


def _named(model: nn.Module, finder: Finder, names: tuple) -> list[Place]:
    places = []
    for text in names:
        name, _, side = str(text).partition(':')
        side = side or 'output'
        if side not in ('input', 'output') or name not in finder.modules:
            raise ValueError(f"places must name modules of {type(model).__name__}, with ':input' appended to pool "
                             f'their input, got {text!r}')
        features = finder.features(name, side)
        if features is None:
            raise NoPlaceError(f'the {side} of {name!r} of {type(model).__name__} is not a single map (B, C, H, W), '
                               '(B, H, W, C) or grid of tokens: name another module')
        places.append(Place(name, side, features, -1, finder.records[name].index if side == 'output' else 0))
    if len({place.name for place in places}) != len(names) or not places:
        raise ValueError(f'places must name one or more modules, each once, got {list(names)}')
    return places


def _fit(model: nn.Module, x: Tensor, finder: Finder, places: list[Place],
         explicit: bool) -> tuple[list[Place], list[bool]]:
    """Returns the places at which a pool works, and for each whether its module runs an added child by itself."""
    runs = runs_children(model, x, places)
    fitted: list[tuple[Place, bool]] = []
    for place, alone in zip(places, runs, strict=True):
        if alone is None:
            # pool the map at the module that reads it
            reader = finder.reader(place.name)
            features = None if reader is None else finder.features(reader, 'input')
            if reader is None or features is None or runs_children(model, x, [Place(reader, 'input', features, 0)])[0]:
                _logger.info('no pool at %s: the module calls its children with other arguments', place.name)
                continue
            place, alone = Place(reader, 'input', features, place.stage), False
        fitted.append((place, alone))
    if not fitted:
        raise NoPlaceError(f'the modules at the requested places of {type(model).__name__} do not call their children '
                           'one after the other: name other places')
    places, run_alone = [place for place, _ in fitted], [alone for _, alone in fitted]
    if x.is_meta:
        return places, run_alone
    ordered = in_raster_order(model, x, places)
    if not all(ordered):
        name = places[ordered.index(False)].name
        raise NoPlaceError(f'the tokens of {type(model).__name__} at {name!r} are not in raster order, so a pool '
                           'would mix distant parts of the image: name other positions or places')
    if explicit:
        return places, run_alone
    reached = reaches_output(model, x, places, run_alone)
    for place, reaches in zip(places, reached, strict=True):
        if not reaches:
            _logger.info('no pool at %s: its map does not affect the output', place.name)
    if not any(reached):
        raise NoPlaceError(f'no map at the requested places of {type(model).__name__} affects the output: '
                           f"choose another of {', '.join(POSITIONS)}, or other stages")
    kept = [(place, alone) for place, alone, reaches in zip(places, run_alone, reached, strict=True) if reaches]
    return [place for place, _ in kept], [alone for _, alone in kept]


def _choose_and_fit(model: nn.Module, x: Tensor, finder: Finder, positions: tuple | None, stages: tuple | None,
                    names: tuple | None) -> tuple[list[Place], list[bool]]:
    """Returns `_fit` of the named places or positions; falls back from the default position to post_block."""
    if names is not None:
        return _fit(model, x, finder, _named(model, finder, names), explicit=True)
    size = (x.shape[-2], x.shape[-1])
    chosen = _choose(model, finder, size, positions, stages)
    try:
        return _fit(model, x, finder, chosen, explicit=False)
    except NoPlaceError as error:
        if positions is not None or not finder.columnar or chosen[0].side != 'input':
            raise
        try:
            fitted = _fit(model, x, finder, _choose(model, finder, size, ('post_block',), stages), explicit=False)
        except NoPlaceError:
            raise error from None
        _logger.warning("Using position 'post_block' because 'pre_attn' does not work: %s.", error)
        return fitted


def _groups(places: list[Place], most: int) -> int:
    """Returns the largest number of groups up to `most` that divides the channels at all places."""
    common = math.gcd(*(place.features.dim for place in places))
    return max(n for n in range(1, most + 1) if common % n == 0)


def add_context_pool(
        model: Any,
        positions: str | Sequence[str] | None = None,
        stages: int | Sequence[int] | None = None,
        places: str | Sequence[str] | None = None,
        ratio: float | None = None,
        floor: float = 0.1,
        groups: int | None = None,
        init: str = 'identity',
        support_init: float = 0.5,
        hidden_dim: int | None = None,
        backend: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
) -> Any:
    """Adds context pools to a model, in place, and keeps its weights and their names.

    The places are found by running the model on a probe image (batch 1), so any network of blocks or stages works, with
    maps `(B, C, H, W)` or `(B, H, W, C)`, or with a grid of tokens after prefix tokens, which are not pooled. With
    `init='identity'`, the output stays bit-identical until the pools are trained; this is checked on the probe image.
    The state dict keeps all its keys and gains those of the pools, which contain `.cpool.`. Places whose map does not
    affect the output are skipped, such as the last block of a network whose head only reads the class token.

    Args:
        model: A network that takes images `(B, C, H, W)`, such as any timm model.
        positions: One or several of `post_stage` (the output of each stage's last block), `post_block` (the output of
            every block), `pre_attn` (the input of each block's attention, after its norm). Default: `post_stage`; in
            networks with one grid, like vision transformers, `pre_attn`, or `post_block` if no block has attention or
            the tokens are not in raster order.
        stages: Indices of the stages that pool, or of the blocks in a network with one grid. Default: those whose maps
            are at least 8 times coarser than the image, or all if there are none.
        places: Names of the modules whose output (`'layer2.1'`) or input (`'blocks.0.attn:input'`) to pool, instead of
            `positions` and `stages`.
        ratio: As in `ContextPool2d`. Default: 0.25 in networks with one grid, otherwise 0.1.
        groups: As in `ContextPool2d`. Default: in networks with one grid, the largest number up to 16 that divides the
            channels, otherwise 1.
        floor, init, support_init, hidden_dim, backend: As in `ContextPool2d`. With `init='paper'`, the pools change the
            output from the start.
        img_size: Size of the probe image. Default: the model's.
        in_chans: Channels of the probe image. Default: the model's.

    Returns:
        `model`.

    Raises:
        NoPlaceError: The model has no such place, or does not run on images. The model is unchanged.
        ValueError: An argument is out of range, or the model already has context pools. The model is unchanged.
    """
    if context_pools(model):
        raise ValueError(
            f'{type(model).__name__} already has context pools (the first is {next(iter(context_pools(model)))!r}): '
            'pass a model without pools, or call remove_context_pool first')
    if places is not None and (positions is not None or stages is not None):
        raise ValueError('places cannot be combined with positions or stages: drop those')
    x = probe_image(model, img_size, in_chans)
    expected = run(model, x)
    finder = Finder(model, x)
    chosen, run_alone = _choose_and_fit(model, x, finder, *(
        None if each is None else as_tuple(each) for each in (positions, stages, places)))
    image_reader, columnar = finder.image_reader(), finder.columnar
    del finder  # frees the recorded features
    if ratio is None:
        ratio = COLUMNAR_RATIO if columnar else STAGED_RATIO
    if groups is None:
        groups = _groups(chosen, COLUMNAR_GROUPS if columnar else STAGED_GROUPS)
    options = {'ratio': ratio, 'floor': floor, 'groups': groups, 'init': init, 'support_init': support_init,
               'hidden_dim': hidden_dim, 'backend': backend}
    _attach_pools(model, x, expected, chosen, run_alone, image_reader, options)
    _record_args(model, options, chosen)
    return model


def _attach_pools(model: nn.Module, x: Tensor, expected: object, places: list[Place], run_alone: list[bool],
                  image_reader: str | None, options: dict[str, Any]) -> None:
    """Adds a pool at each place and checks the output on the probe image; on failure, the model does not change."""
    try:
        for place, alone in zip(places, run_alone, strict=True):
            _attach_pool(model, place, alone, options)
        followers = [pool for pool in context_pools(model).values() if isinstance(pool, GridContextPool)]
        if followers and image_reader is not None:
            follow_images(model.get_submodule(image_reader), followers)
        result = run(model, x)
        if options['init'] == 'identity' and finite(expected) and not equal(expected, result):
            raise NoPlaceError(
                f'{type(model).__name__} does not give the same output with untrained pools at '
                f"{', '.join(place.name for place in places)}: choose other positions or stages")
    except BaseException:
        _detach_pools(model)
        raise


def _attach_pool(model: nn.Module, place: Place, runs_alone: bool, options: dict[str, Any]) -> None:
    module = model.get_submodule(place.name)
    parameter = next(p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point())
    pool = create_pool(place.features.layout, place.features.dim, place.features.prefix, place.features.grid,
                       device=parameter.device, dtype=parameter.dtype, **options)
    pool.train(module.training)
    attach(module, pool, place.side, runs_alone, place.index)


def _detach_pools(model: nn.Module) -> list[str]:
    """Removes all pools added by `attach`; returns the names of the modules that had one."""
    names = [name.rpartition('.')[0] for name in context_pools(model) if name.rpartition('.')[2] == 'cpool']
    unfollow_images(model)
    for name in names:
        detach(model.get_submodule(name))
    return names


def _record_args(model: Any, options: dict[str, Any], places: list[Place]) -> None:
    """Stores the arguments in the model's configuration, so that timm can save and recreate it with its pools."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not cfg.get('architecture'):
        return
    args = {f'cpool_{key}': value for key, value in options.items() if value is not None}
    # the chosen places, not positions: a saved model must not depend on how places are found
    args['cpool_places'] = [place.name if place.side == 'output' else f'{place.name}:input' for place in places]
    model._base_cfg = cfg, dict(getattr(model, '_model_args', {}))
    base = cfg['architecture']
    model.pretrained_cfg = model.default_cfg = dict(cfg, architecture=ARCHITECTURE)
    model._model_args = dict(getattr(model, '_model_args', {}), base=base, **args)


def remove_context_pool(model: Any) -> Any:
    """Removes the pools that `add_context_pool` added, in place, with their weights.

    Raises:
        ValueError: The model has no pool from `add_context_pool`.
    """
    if not _detach_pools(model):
        raise ValueError(f'{type(model).__name__} has no context pool from add_context_pool: add pools first')
    if hasattr(model, '_base_cfg'):
        cfg, args = model._base_cfg
        model.pretrained_cfg = model.default_cfg = cfg
        model._model_args = args
        del model._base_cfg
    return model
