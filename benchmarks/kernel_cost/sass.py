"""Reads a kernel's machine code: instructions, what they wait for, loops, and the path that a program takes."""
import dataclasses
import math
import re
import subprocess
import tempfile
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
CLASSES = {
    'fp': 'FFMA FMUL FADD FFMA2 HFMA2 HMUL2 HADD2', 'mufu': 'MUFU', 'mma': 'HMMA HGMMA IMMA',
    'global': 'LDG STG LDGSTS RED ATOM ATOMG UTMALDG UTMASTG UBLKCP LDL STL', 'shared': 'LDS STS LDSM STSM ATOMS',
    'shfl': 'SHFL', 'bar': 'BAR DEPBAR LDGDEPBAR SYNCS WARPSYNC WARPGROUP MEMBAR FENCE ARRIVES WARPGROUPDEPBAR',
    'conv': 'I2F I2FP F2I F2F F2FP FRND',
    'pred': 'ISETP FSETP PLOP3 SEL FSEL FMNMX FSET BRA EXIT BSSY BSYNC CALL RET BREAK P2R R2P UISETP UPLOP3 USEL VOTE'}
_CLASS = {op: name for name, ops in CLASSES.items() for op in ops.split()}
_XU = set('MUFU I2F F2I F2F FRND POPC FLO BREV'.split())
_LSU = set('LDG STG LDGSTS RED ATOM ATOMG LDS STS LDSM STSM ATOMS SHFL LDL STL'.split())
_FMA = set('FFMA FMUL FADD HFMA2 HMUL2 HADD2 IMAD'.split())
_NO_PIPE = set('BRA EXIT BSSY BSYNC CALL RET NOP S2R S2UR CS2R LDC BREAK R2UR'.split())
# Multiply-adds of a scheduler's tensor core in a clock, and the share of it that mma.sync reaches on Hopper.
_MACS, _MMA_SYNC = 1024, 0.62


def _macs(op: str) -> float:
    """Multiply-adds of one warp's tensor instruction."""
    if found := re.match(r'HGMMA\.(\d+)x(\d+)x(\d+)', op):
        return math.prod(map(int, found.groups())) / 4
    if found := re.match(r'HMMA\.(16816|1688|1684)', op):
        return {'16816': 2048, '1688': 1024, '1684': 512}[found[1]]
    return 0


@dataclasses.dataclass
class Instruction:
    """An instruction with its control code: clocks to stall, and scoreboards that it sets and waits for."""
    op: str
    rest: str
    predicated: bool
    stall: int
    write: int
    read: int
    wait: int

    def __post_init__(self) -> None:
        self.base = self.op.split('.')[0]
        self.kind = _CLASS.get(self.base, 'int')
        self.macs = _macs(self.op)
        self.pipe, self.clocks = self._pipe()

    def _pipe(self) -> tuple[str, float]:
        """Pipe, and clocks for which one warp's instruction holds a scheduler's share of it."""
        if self.base in _XU:
            return 'xu', 8
        if self.base in _LSU:
            for size, wavefronts in (('.128', 4), ('.64', 2), ('.4', 4), ('.2', 2)):
                if re.search(re.escape(size) + r'(\.|$)', self.op):
                    return 'lsu', 4 * wavefronts
            return 'lsu', 4
        if self.kind == 'mma':
            rate = _MACS * (1 if self.base == 'HGMMA' else _MMA_SYNC) * (0.5 if 'TF32' in self.op else 1)
            return 'tensor', self.macs / rate
        if self.base in _FMA:
            return 'fma', 2 if self.base == 'IMAD' else 1
        if self.base in _NO_PIPE or self.base.startswith('U') or self.kind == 'bar':
            return '', 0
        return 'alu', 2


@dataclasses.dataclass
class Loop:
    """Indices of a loop's instructions, the last included, and the loops inside."""
    first: int
    last: int
    inner: list['Loop'] = dataclasses.field(default_factory=list)
    trips: float = 1.0


@dataclasses.dataclass
class Machine:
    """A kernel's code, its outermost loops, registers of a thread and bytes of its stack, which holds what spilled."""
    code: list[Instruction]
    targets: list[int | None]
    loops: list[Loop]
    registers: int
    stack: int

    def count(self, loop: Loop, kind: str) -> int:
        return sum(i.kind == kind for i in self.code[loop.first:loop.last + 1])

    def hot(self, loops: list[Loop]) -> list[Loop]:
        """The loops that do the work: copies of one that was unrolled weigh alike.

        Where weights are formed in two ways, that which takes less arithmetic is meant: models take no other.
        """
        products = [loop for loop in loops if self.count(loop, 'mma')]
        if products:
            work = [8 * self.count(loop, 'mufu') + self.count(loop, 'fp') for loop in products]
            loops = [loop for loop, n in zip(products, work, strict=True) if n <= 1.05 * min(work)]
        weights = [loop.last - loop.first + 20 * self.count(loop, 'mma') + 4 * self.count(loop, 'mufu')
                   for loop in loops]
        return [loop for loop, weight in zip(loops, weights, strict=True) if 2 * weight > max(weights)]

    def path(self) -> list[int]:
        """Indices of the instructions that a program passes over: without branches to loops that are not hot."""
        hot = self.hot(self.loops)
        cold = [loop for loop in self.loops if loop not in hot and self.count(loop, 'mma')]
        out, n = [], 0
        while n < len(self.code):
            out.append(n)
            instruction, target = self.code[n], self.targets[n]
            if instruction.base == 'EXIT' and not instruction.predicated:
                break
            if target is not None and target > n:
                skips_cold, skips_hot = (any(n < loop.first < target for loop in loops) for loops in (cold, hot))
                if not instruction.predicated or skips_cold and not skips_hot:
                    n = target
                    continue
            n += 1
        return out


def _tool(name: str, file: Path, *flags: str) -> str:
    return subprocess.run(  # noqa: S603
        [str(BIN / name), *flags, str(file)], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> Machine:
    """Machine code of a compiled kernel, by the tools that come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'kernel.cubin'
        file.write_bytes(cubin)
        text, usage = _tool('nvdisasm', file, '-c', '-hex'), _tool('cuobjdump', file, '-res-usage')
    raw: list[list] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in text.splitlines():
        if found := re.match(r'\s*([.$\w]+):\s*$', line):
            if found[1].startswith('$'):
                break           # slow paths of divisions
            pending.append(found[1])
        elif found := re.search(r'/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);', line):
            labels.update((label, len(raw)) for label in pending)
            pending = []
            raw.append([found[2], found[3], found[1] is not None, 0])
        elif raw and (found := re.match(r'\s*/\* 0x([0-9a-f]{16}) \*/', line)):
            raw[-1][3] = int(found[1], 16) >> 41
    code = [Instruction(op, rest, predicated, c & 15, c >> 5 & 7, c >> 8 & 7, c >> 11 & 63)
            for op, rest, predicated, c in raw]
    targets: list[int | None] = [None] * len(code)
    headers: dict[int, int] = {}
    end = len(code)
    for n, i in enumerate(code):
        found = re.search(r'\((\.L_x_\d+)\)', i.rest) if i.base == 'BRA' else None
        if not found or found[1] not in labels:
            continue
        to = targets[n] = labels[found[1]]
        if to == n:
            end = min(end, n)       # behind the program
        elif to < n and not any(j.op == 'EXIT' for j in code[to:n]):
            headers[to] = max(headers.get(to, 0), n)
    roots: list[Loop] = []
    stack: list[Loop] = []
    for first, last in sorted(headers.items()):
        loop = Loop(first, last)
        while stack and stack[-1].last < first:
            stack.pop()
        (stack[-1].inner if stack else roots).append(loop)
        stack.append(loop)
    registers, held = re.findall(r'REG:(\d+) STACK:(\d+)', usage)[0]
    return Machine(code[:end], targets[:end], roots, int(registers), int(held))
