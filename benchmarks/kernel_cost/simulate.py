"""Plays a kernel's machine code on one scheduler: stall counts, scoreboards and pipes, with the warps that fit.

Neither caches nor bank conflicts nor waits for other warps are known to it.
"""
import heapq
import re
from collections import Counter, deque

from .sass import Instruction, Loop, Machine

# Clocks until a result that is tracked by a scoreboard is there.
LATENCY = {'LDG': 280, 'LDGSTS': 300, 'ATOM': 400, 'LDS': 29, 'LDSM': 33, 'MUFU': 23, 'SHFL': 25, 'S2R': 30, 'LDC': 40,
           'ULDC': 30, 'I2F': 20, 'F2I': 20, 'F2F': 20, 'LDL': 40, 'HGMMA': 60, 'HMMA': 34, 'BAR': 24}


def _play(stream: list[Instruction], warps: int) -> float:
    """Clocks until so many warps of one scheduler have run a stream of instructions."""
    free: Counter[str] = Counter()
    issue = end = 0.0
    state = [([0.0] * 8, [0.0], deque[float](maxlen=16)) for _ in range(warps)]
    queue = [(0.0, k, 0) for k in range(warps)]
    while queue:
        t, k, n = heapq.heappop(queue)
        i, (ready, group, groups) = stream[n], state[k]
        need = max([ready[b] for b in range(6) if i.wait >> b & 1], default=0.0)
        if i.op.startswith('WARPGROUP.DEPBAR') and i.rest.endswith('0x0 '):
            need = max(need, ready[6])
        if i.op.startswith('DEPBAR') and 'SB0' in i.rest:
            left = int((re.findall(r'0x([0-9a-f]+)', i.rest) or ['0'])[0], 16)
            need = max(need, groups[-1 - left] if len(groups) > left else 0.0)
        start = max(need, issue, free[i.pipe] if i.pipe else 0.0)
        if start > t:
            # Not yet: back in line, behind whoever may go first.
            heapq.heappush(queue, (start, k, n))
            continue
        issue = t + 1
        if i.pipe:
            free[i.pipe] = max(free[i.pipe], t) + i.clocks  # type: ignore[assignment]
        done = t + LATENCY.get(i.base, 12) + i.clocks
        if i.write < 6:
            ready[i.write] = max(ready[i.write], done)
        if i.read < 6:
            ready[i.read] = max(ready[i.read], t + 12 + i.clocks)
        if i.base == 'LDGSTS':
            group[0] = max(group[0], done)
        elif i.base == 'LDGDEPBAR':
            groups.append(group[0])
        elif i.base == 'HGMMA':
            ready[6] = done
        elif i.base == 'BAR':
            t += LATENCY['BAR']
        end = max(end, t)
        if n + 1 < len(stream):
            heapq.heappush(queue, (t + max(1, i.stall), k, n + 1))
    return end


def nests(machine: Machine, levels: int) -> list[list[Loop]]:
    """The hot loops of every level, outermost first."""
    out, loops = [], machine.hot(machine.loops)
    for _ in range(levels):
        out.append(loops)
        loops = machine.hot([inner for loop in loops for inner in loop.inner])
    return out


def depth(machine: Machine) -> int:
    """Levels of loops that the hot nest has in machine code."""
    n, loops = 0, machine.hot(machine.loops)
    while loops:
        n, loops = n + 1, machine.hot([inner for loop in loops for inner in loop.inner])
    return n


def expand(machine: Machine, trips: dict[int, int]) -> list[Instruction]:
    """The stream of a program, with each loop's trips by `id`; others run once."""
    path = set(machine.path())

    def body(loops: list[Loop], first: int, last: int) -> list[Instruction]:
        out, n = [], first
        for loop in loops:
            out += [machine.code[m] for m in range(n, loop.first) if m in path]
            if loop.first in path:
                out += body(loop.inner, loop.first, loop.last) * trips.get(id(loop), 1)
            n = loop.last + 1
        return out + [machine.code[m] for m in range(n, last + 1) if m in path]

    return body(machine.loops, 0, len(machine.code) - 1)


def clocks(machine: Machine, trips: list[float], warps: int) -> float:
    """Clocks of a scheduler's resident warps with mean trips of the hot nest: linear in each, from short runs."""
    loops = nests(machine, len(trips))

    def run(counts: list[int]) -> float:
        times = {id(loop): n for nest, n in zip(loops, counts, strict=True) for loop in nest}
        return _play(expand(machine, times), warps)

    if all(n == int(n) for n in trips) and _product(trips) <= 8:
        return run([int(n) for n in trips])
    levels = range(len(trips))
    start = run([2 for _ in levels])
    steps = [run([4 if j == k else 2 for j in levels]) - start for k in levels] + [0.0]
    parts = [steps[k] - steps[k + 1] for k in levels]
    return start - steps[0] + sum(part * _product([n / 2 for n in trips[:k + 1]]) for k, part in enumerate(parts))


def _product(values: list[float]) -> float:
    out = 1.0
    for value in values:
        out *= value
    return out
