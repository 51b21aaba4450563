"""Finds where a model can pool, from a run on a probe image, without knowledge of model families."""
import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..inspect.maps import kept_modes
from .pools import solve_grid

POSITIONS = ('post_stage', 'post_block', 'pre_attn')
_ATTENTION = ('attn', 'token_mixer', 'self_attn', 'attention', 'mixer', 'attn_block')
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MAX_PREFIX = 4


class NoPlaceError(ValueError):
    """The model has no place for a context pool at the requested positions."""


@dataclasses.dataclass
class Features:
    """Shape of the features that a module reads or returns.

    Attributes:
        layout: `NCHW`, `NHWC` or `NLC`.
        dim: Channels.
        grid: `(H, W)` in pixels or tokens.
        prefix: Leading tokens that are not part of the grid.
    """
    layout: str
    dim: int
    grid: tuple[int, int]
    prefix: int = 0


@dataclasses.dataclass
class Place:
    """A place for a pool.

    Attributes:
        name: Name of the module.
        side: `input` or `output` of the module.
        features: Shape of the features there.
        stage: Index of the stage.
        index: Entry to pool if the module returns a tuple or list.
    """
    name: str
    side: str
    features: Features
    stage: int
    index: int = 0


@dataclasses.dataclass
class _Record:
    calls: int = 0
    read: Tensor | None = None
    returned: Tensor | None = None
    index: int = 0


def entry(value: Any, index: int) -> Any:
    """Returns the entry at `index` of a tuple or list; other values unchanged."""
    return value[index] if isinstance(value, (tuple, list)) and len(value) > index else value


def _tensor(value: Any, index: int = 0) -> Tensor | None:
    value = entry(value, index)
    return value if isinstance(value, Tensor) else None


def run_eval(model: nn.Module, x: Tensor) -> Any:
    """Returns `model(x)` in eval mode without gradients; restores the mode of every module."""
    with kept_modes(model), torch.no_grad():
        return model(x)


def _record(model: nn.Module, x: Tensor, shapes: 'Shapes') -> dict[str, _Record]:
    records: dict[str, _Record] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            record = records.setdefault(name, _Record())
            record.calls += 1
            # the first argument, positional or not; an in-place module may have changed its values, but not its shape
            record.read = _tensor(args) if args else _tensor(list(kwargs.values()))
            entries = range(len(output)) if isinstance(output, (tuple, list)) else range(1)
            record.index = next((i for i in entries if shapes.read(_tensor(output, i)) is not None), 0)
            record.returned = _tensor(output, record.index)
        return hook

    handles = [module.register_forward_hook(hook_of(name), with_kwargs=True)
               for name, module in model.named_modules() if name]
    try:
        run_eval(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return records


class Shapes:
    """Infers layout, channels and grid from the shape of a tensor, for images of one size."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.height, self.width = x.shape[-2:]
        self.batch = x.shape[0]
        self.output_fmt = getattr(getattr(model, 'output_fmt', None), 'value', getattr(model, 'output_fmt', None))
        prefix = getattr(model, 'num_prefix_tokens', 0)
        self.prefixes = [prefix] if isinstance(prefix, int) else []
        self.prefixes += [n for n in range(_MAX_PREFIX + 1) if n not in self.prefixes]

    def _is_grid(self, rows: int, columns: int) -> bool:
        return 1 < rows * columns and rows <= self.height and columns <= self.width and \
            abs(rows * self.width - columns * self.height) <= max(self.height, self.width)

    def read(self, t: Tensor | None) -> Features | None:
        """Returns the features of a tensor, or None if it is not one map per image."""
        if t is None or not t.is_floating_point() or t.shape[0] != self.batch:
            return None
        if t.ndim == 4:
            first, last = self._is_grid(*t.shape[2:]), self._is_grid(*t.shape[1:3])
            if first and last:
                first = self.output_fmt != 'NHWC'
            if first:
                return Features('NCHW', t.shape[1], (t.shape[2], t.shape[3]))
            return Features('NHWC', t.shape[3], (t.shape[1], t.shape[2])) if last else None
        if t.ndim == 3:
            for prefix in self.prefixes:
                grid = solve_grid(t.shape[1] - prefix, self.height, self.width) if t.shape[1] > prefix else None
                if grid is not None and self._is_grid(*grid):
                    return Features('NLC', t.shape[2], grid, prefix)
        return None


def _composite(module: nn.Module) -> bool:
    """Returns whether a module has more than one layer: two or more of its descendants own parameters."""
    owners = 0
    for child in module.modules():
        owners += child is not module and next(child.parameters(recurse=False), None) is not None
        if owners > 1:
            return True
    return False


class Finder:
    """Finds the places of a model by position.

    Args:
        model: The model.
        x: A probe image on the model's device.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.modules = dict(model.named_modules())
        self.image = x
        self.shapes = Shapes(model, x)
        self.records = _record(model, x, self.shapes)
        self.names = [name for name, record in self.records.items() if record.calls == 1]
        self.stages = self._stages(model)

    def features(self, name: str, side: str = 'output') -> Features | None:
        """Returns the features that a module returns or reads; None if they are not a map or it does not run once."""
        record = self.records.get(name)
        if record is None or record.calls != 1:
            return None
        return self.shapes.read(record.returned if side == 'output' else record.read)

    @property
    def columnar(self) -> bool:
        """Whether all stages have one grid, as in a plain vision transformer."""
        grids = {self.found(name).grid for name in self.stages}
        return len(grids) == 1

    def found(self, name: str) -> Features:
        """Returns the features that a module returns.

        Raises:
            NoPlaceError: They are not a map.
        """
        features = self.features(name)
        if features is None:
            raise NoPlaceError(f'{name} does not return a map: name another module')
        return features

    def _stages(self, model: nn.Module) -> list[str]:
        """Returns the last module of each stage, in order of execution: from the model's `feature_info`, else found."""
        listed = []
        info = getattr(model, 'feature_info', None) or []
        for entry in getattr(info, 'info', info):
            name = entry.get('module', '') if isinstance(entry, dict) else ''
            # models with features_only=True list the module names of the original network
            name = name if name in self.modules else name.replace('.', '_')
            if name in self.modules and self.features(name) is not None:
                listed.append(name)
        return [self._block(name) for name in listed] or self._stages_found()

    def _stages_found(self) -> list[str]:
        """Returns the last module of each grid, or all modules if there is only one grid.

        Modules are blocks that occur several times in a container, or else any module with more than one layer.
        """
        candidates = [name for name, module in self.modules.items()
                      if name and not isinstance(module, _CONTAINERS) and _composite(module)
                      and self.features(name) is not None]
        kinds = collections.Counter((name.rpartition('.')[0], type(self.modules[name])) for name in candidates)
        in_rows = [name for name in candidates
                   if isinstance(self.modules[name.rpartition('.')[0]], _CONTAINERS)
                   and kinds[name.rpartition('.')[0], type(self.modules[name])] > 1]
        outermost: list[str] = []
        for name in in_rows or candidates:
            if not any(name.startswith(f'{other}.') for other in outermost):
                outermost.append(name)
        outermost = [name for name in self.names if name in outermost]
        last = {self.found(name).grid: name for name in outermost}
        ends = [name for name in outermost if name in last.values()]
        return outermost if len(ends) < 2 else ends

    def reader(self, name: str) -> str | None:
        """Returns the outermost module that reads the unchanged output of the module `name`, or None."""
        output = self.records[name].returned
        for other, record in self.records.items():
            if record.calls == 1 and record.read is output and not other.startswith(f'{name}.') \
                    and not name.startswith(f'{other}.') and not isinstance(self.modules[other], _CONTAINERS):
                return other
        return None

    def image_reader(self) -> str | None:
        """Returns the first module that reads the unchanged images, or None."""
        for name in self.modules:
            record = self.records.get(name)
            if record is not None and record.calls == 1 and record.read is self.image:
                return name
        return None

    def _block(self, stage: str) -> str:
        """Returns the last block of a stage: the outermost composite module in it that returns the same tensor."""
        output = self.records[stage].returned
        for name, module in self.modules.items():
            if not name.startswith(f'{stage}.') or isinstance(module, _CONTAINERS) or not _composite(module):
                continue
            record = self.records.get(name)
            if record is not None and record.calls == 1 and record.returned is output:
                return name
        return stage

    def _blocks(self, stage: str) -> Iterator[str]:
        """Yields the blocks of a stage, in order."""
        parent = stage.rpartition('.')[0]
        if not parent:
            yield stage
            return
        for child in self.modules[parent]._modules:
            name = f'{parent}.{child}'
            module = self.modules.get(name)
            if name == stage or module is not None and not isinstance(module, _CONTAINERS) and _composite(module):
                if self.features(name) is not None:
                    yield name

    def place(self, name: str, stage: int) -> Place:
        """Returns the place at the output of a module."""
        return Place(name, 'output', self.found(name), stage, self.records[name].index)

    def places(self, position: str) -> list[Place]:
        """Returns all places at a position, in order."""
        if position == 'post_stage':
            return [self.place(name, i) for i, name in enumerate(self.stages)]
        blocks: dict[str, int] = {}
        for i, stage in enumerate(self.stages):
            # if every block is listed as a stage, each is a stage of its own
            for name in self._blocks(stage):
                blocks.setdefault(name, i)
        blocks.update({name: i for i, name in enumerate(self.stages)})
        if position == 'post_block':
            return [self.place(name, i) for name, i in blocks.items()]
        places = []
        for block, i in blocks.items():
            for child in _ATTENTION:
                features = self.features(f'{block}.{child}', 'input')
                if features is not None:
                    places.append(Place(f'{block}.{child}', 'input', features, i))
        return places
