"""Compiles `kernels.c` with the machine's C compiler on first use, and keeps the library in the user's cache folder.

What is loaded runs as the user: the folder and the library must be the user's own, writable by nobody else, and no
symbolic links; the library's hash, which is part of its name, must be that of its bytes.
"""
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name('kernels.c')
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob('*.h')))
FLAGS = ('-O3', '-march=native', '-fno-math-errno', '-ffp-contract=fast', '-fopenmp', '-shared', '-fPIC')
TIMEOUT_S = 120
# Of a compilation: a folder left by one that was killed goes when it is older than any that can be running.
SCRATCH = 'build-'
SCRATCH_AGE_S = 10 * TIMEOUT_S

_log = logging.getLogger(__name__)


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
    """`$CPOOL_VISION_CACHE`, or `cpool_vision` in the user's cache folder.

    Raises:
        BuildError: there is no home folder, or a relative one is named.
    """
    chosen = os.environ.get('CPOOL_VISION_CACHE')
    if chosen:
        if not os.path.isabs(chosen):
            raise BuildError(f'CPOOL_VISION_CACHE={chosen} must be an absolute path')
        return Path(chosen)
    # A relative XDG_CACHE_HOME counts as none, as its specification says.
    base = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(base):
        try:
            base = str(Path.home() / '.cache')
        except RuntimeError:
            base = ''
    if not os.path.isabs(base):
        raise BuildError('there is no home folder to keep the library in (name a folder in CPOOL_VISION_CACHE)')
    return Path(base) / 'cpool_vision'


def _why_not_trusted(path: Path, kind: str) -> str | None:
    """Why what lies at `path` may not be what this user put there, or None."""
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        return f'{path} is a symbolic link'
    if not (stat.S_ISDIR if kind == 'folder' else stat.S_ISREG)(facts.st_mode):
        return f'{path} is not a {kind}'
    if facts.st_uid != os.geteuid():
        return f'{path} belongs to another user'
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f'{path} may be written by others (chmod go-w)'
    return None


def _check_folder(folder: Path) -> None:
    """Raises unless `folder` is the user's own, or not there yet."""
    with contextlib.suppress(FileNotFoundError):
        if not os.environ.get('CPOOL_VISION_CACHE') and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(PermissionError):
                folder.chmod(0o700)  # an umask may have let others in
        reason = _why_not_trusted(folder, 'folder')
        if reason is not None:
            raise BuildError(f'the cache cannot be trusted: {reason}; name another folder in CPOOL_VISION_CACHE')
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BuildError(f'the library cannot be written to {folder} (name a folder in CPOOL_VISION_CACHE)')


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get('CC', ''))
    except ValueError as error:
        raise BuildError(f'CC={os.environ["CC"]} is not a command: {error}') from None
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


def _run(command: list[str], **env: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603  the user's own compiler
            command, capture_output=True, text=True, errors='replace', timeout=TIMEOUT_S, check=False,
            env={**os.environ, **env})
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]} did not run: {error}') from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'exit status {done.returncode}']
        first = next((line for line in lines if 'error' in line), lines[0])
        raise BuildError(f'{command[0]} failed: {first}')
    return done.stdout


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _find(folder: Path, key: str) -> Path | None:
    """The library of this key, whole and the user's own; a damaged one is removed with one line that says so."""
    for path in sorted(folder.glob(f'kernels-{key}-*.so')):
        reason = _why_not_trusted(path, 'file')
        if reason is not None:
            raise BuildError(f'the cache cannot be trusted: {reason}; remove it')
        if path.stem == f'kernels-{key}-{_hash(path)}':
            return path
        _log.warning('the compiled library %s is damaged and is built again', path)
        path.unlink(missing_ok=True)
    return None


def _sweep(folder: Path) -> None:
    """Removes what compilations that were killed have left."""
    for path in folder.glob(f'{SCRATCH}*'):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > SCRATCH_AGE_S:
                shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build() -> Path:
    """Path of the compiled library, made now unless the cache holds it.

    Raises:
        BuildError: there is no compiler, it fails, the library cannot be written, or the cache cannot be trusted.
    """
    compiler, folder = _compiler(), cache_folder()
    _check_folder(folder)
    key = _key(compiler, _run([*compiler, '--version']))
    try:
        found = _find(folder, key)
        if found is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_folder(folder)
        _sweep(folder)
        # Beside its place, so that of processes that build at once each finds nothing or a whole library.
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            made = Path(scratch) / 'kernels.so'
            _run([*compiler, *FLAGS, str(SOURCE), '-o', str(made), '-lm'], TMPDIR=scratch)
            made.chmod(0o700)
            target = folder / f'kernels-{key}-{_hash(made)}.so'
            _sync(made)
            os.replace(made, target)
            _sync(folder)
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
    for name, tensors in (('cpool_forward', 6), ('cpool_backward', 10)):
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(Shape), *[ctypes.c_void_p] * tensors]
        function.restype = ctypes.c_int
    library.cpool_transpose.argtypes = [*[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 2]
    library.cpool_transpose.restype = None
    return library


def why_not() -> str | None:
    """None if the kernels can be called as far as is known without compiling them, else the reason."""
    if os.environ.get('CPOOL_VISION_NATIVE') == '0':
        return 'CPOOL_VISION_NATIVE=0 turns it off'
    if load.cache_info().currsize:
        return prepare()
    try:
        if sys.platform == 'win32':
            raise BuildError('it is built on Linux and macOS only')
        _compiler()
        _check_folder(cache_folder())
    except (BuildError, OSError) as error:
        return str(error)
    return None


def prepare() -> str | None:
    """Compiles the kernels unless that was done or tried: None, or why they cannot be had."""
    found = load()
    return str(found) if isinstance(found, BuildError) else None
