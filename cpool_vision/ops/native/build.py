"""Compiles `kernels.c` with the machine's C compiler on first use, and keeps the library in the user's cache folder."""
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name('kernels.c')
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob('*.h')))
FLAGS = ('-O3', '-march=native', '-fno-math-errno', '-ffp-contract=fast', '-fopenmp', '-shared', '-fPIC')
TIMEOUT_S = 120


class Shape(ctypes.Structure):
    """`Shape` of tile.h."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            'maps', 'groups', 'channels', 'height', 'width', 'out_height', 'out_width', 'stride',
            'x_image', 'x_pixel', 'dx_image', 'dx_pixel', 'y_image', 'y_pixel', 'y_channel', 'bands', 'shared',
            'threads')),
        ('tolerance', ctypes.c_float),
    ]


class BuildError(RuntimeError):
    """The kernels cannot be had on this machine; the message says why."""


def cache_folder() -> Path:
    """`$CPOOL_VISION_CACHE`, or `cpool_vision` in the user's cache folder."""
    chosen = os.environ.get('CPOOL_VISION_CACHE')
    if chosen:
        return Path(chosen)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'cpool_vision'


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get('CC', ''))
    for command in (named, ['cc'], ['gcc'], ['clang']):
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    raise BuildError('no C compiler was found (install gcc, or name one in CC)')


def _processor() -> str:
    """What `-march=native` stands for: a home folder may be shared by unlike machines."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(('flags', 'Features', 'model name'))][:2]
    return '\n'.join((platform.machine(), platform.processor(), *features))


def _key(compiler: list[str], version: str) -> str:
    parts = (*(path.read_text(encoding='utf-8') for path in SOURCES), *FLAGS, *compiler, version, _processor())
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:24]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603  the user's own compiler
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]} did not run: {error}') from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'exit status {done.returncode}']
        first = next((line for line in lines if 'error' in line), lines[0])
        raise BuildError(f'{command[0]} failed: {first}')
    return done.stdout


def build() -> Path:
    """Path of the compiled library, made now unless the cache holds it.

    Raises:
        BuildError: there is no compiler, it fails, or the library cannot be written.
    """
    compiler = _compiler()
    try:
        target = cache_folder() / f'kernels-{_key(compiler, _run([*compiler, "--version"]))}.so'
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that of processes that build at once each finds nothing or a whole library.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _run([*compiler, *FLAGS, str(SOURCE), '-o', str(made), '-lm'])
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f'the library cannot be written: {error} (name a folder in CPOOL_VISION_CACHE)') from None
    return target


@functools.cache
def load() -> ctypes.CDLL | BuildError:
    """The library, or why there is none. Tried once in a process."""
    try:
        if sys.platform == 'win32':
            raise BuildError('it is built on Linux and macOS only')
        library = ctypes.CDLL(str(build()))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f'the library does not load: {error}')
    for name, tensors in (('cpool_forward', 5), ('cpool_backward', 8)):
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(Shape), *[ctypes.c_void_p] * tensors]
        function.restype = ctypes.c_int
    library.cpool_transpose.argtypes = [*[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 2]
    library.cpool_transpose.restype = None
    return library


def why_not() -> str | None:
    """None if the kernels can be called, else the reason."""
    if os.environ.get('CPOOL_VISION_NATIVE') == '0':
        return 'CPOOL_VISION_NATIVE=0 turns it off'
    found = load()
    return str(found) if isinstance(found, BuildError) else None
