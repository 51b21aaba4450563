"""What a compiled launch costs: instructions and exponentials by pair, occupancy, and implied milliseconds."""
import dataclasses
import math

import torch

from . import simulate
from .launches import Call, Launch, compile_call
from .sass import Instruction, Machine, disassemble
from .windows import Windows

# Of an H200 or H100 SXM.
SMS, SCHEDULERS, CLOCK_HZ = 132, 4, 1.98e9
COPY_BYTES_S = 4.17e12          # of a large copy, read and written
REGISTERS, SHARED, WARPS, CTAS = 65536, 227 * 1024, 64, 32
LAUNCH_MS = 2e-3                # from an empty device to the first program and back


_Counted = list[tuple[Instruction, float]]


@dataclasses.dataclass
class Cost:
    """Of one kernel. Instructions and exponentials are lanes' by (query, key) pair, of the loop nest that makes them.

    `simulated_ms` plays the machine code (`simulate`); it misses cache misses, bank conflicts and skew at barriers.
    """
    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    ctas_per_sm: int
    instructions_per_pair: float
    exponentials_per_pair: float
    pairs: float
    simulated_ms: float
    bytes_ms: float
    issue_ms: float


def occupancy(registers: int, warps: int, shared: int) -> int:
    """Programs that fit on a multiprocessor."""
    per_warp = -(-registers * 32 // 256) * 256
    return max(1, min(REGISTERS // (per_warp * warps), SHARED // (shared + 1024), WARPS // warps, CTAS))


def _trips_in_code(machine: Machine, trips: list[float]) -> list[float]:
    """Trips of the levels that are loops in machine code: others were flattened or unrolled."""
    trips, levels = list(trips), simulate.depth(machine)
    while len(trips) > levels:
        trips.pop(trips.index(1) if 1 in trips else len(trips) - 1)
    return trips


def _counts(machine: Machine, trips: list[float]) -> tuple[_Counted, _Counted]:
    """Instructions of a program, and of its hot nest, with how often they run."""
    loops = simulate.nests(machine, len(trips))
    times = [1.0] * len(machine.code)
    inside = [False] * len(machine.code)
    for nest, n in zip(loops, trips, strict=True):
        for loop in nest:
            for k in range(loop.first, loop.last + 1):
                times[k] *= n
                inside[k] = True
    path = machine.path()
    return ([(machine.code[k], times[k]) for k in path], [(machine.code[k], times[k]) for k in path if inside[k]])


def by_pair(launch: Launch, trips: list[float]) -> tuple[float, float]:
    """Instructions and exponentials of the loop nest that makes the pairs, lanes' by pair."""
    machine = disassemble(launch.compiled.asm['cubin'])
    _, nest = _counts(machine, _trips_in_code(machine, trips))
    lanes = 32 * launch.compiled.metadata.num_warps / _pairs(launch, trips)
    return sum(n for _, n in nest) * lanes, sum(n for i, n in nest if i.base == 'MUFU') * lanes


def _pairs(launch: Launch, trips: list[float]) -> float:
    """(Query, key) pairs of a program, those of padding among them."""
    a = launch.args
    return a['TILE_H'] * a['TILE_W'] * a['CHUNK'] * a['XW'] * math.prod(trips[:2])


def cost(launch: Launch, trips: list[float]) -> Cost:
    """The cost of one launch whose loops run `trips` times, the outermost first."""
    meta = launch.compiled.metadata
    machine = disassemble(launch.compiled.asm['cubin'])
    warps = meta.num_warps
    ctas = occupancy(machine.registers, warps, meta.shared)
    seen = _trips_in_code(machine, trips)
    program, _ = _counts(machine, seen)
    a = launch.args
    has_pairs = 'TILE_H' in a
    instructions, exponentials = by_pair(launch, trips) if has_pairs else (0.0, 0.0)
    resident = max(1, math.ceil(min(ctas, -(-launch.grid // SMS)) * warps / SCHEDULERS))
    rounds = max(1.0, launch.grid * warps / (SMS * SCHEDULERS * resident))
    tensors = [t for name, t in a.items() if isinstance(t, torch.Tensor) and name != 'p_kept']
    bytes_ms = sum(t.numel() * t.element_size() for t in tensors) / COPY_BYTES_S * 1e3
    busy = simulate.clocks(machine, seen, resident) * rounds / CLOCK_HZ * 1e3
    return Cost(
        launch.name, machine.registers, machine.stack, meta.shared, warps, ctas,
        instructions, exponentials, _pairs(launch, trips) * launch.grid if has_pairs else 0.0,
        max(busy, bytes_ms) + LAUNCH_MS, bytes_ms,
        sum(n for _, n in program) * launch.grid * warps / (SMS * SCHEDULERS * CLOCK_HZ) * 1e3)


def costs(call: Call, arch: int = 90) -> list[Cost]:
    """The costs of every kernel of a forward and a backward pass."""
    windows = Windows(call)
    return [cost(launch, windows.trips(launch)) for launch in compile_call(call, arch)]
