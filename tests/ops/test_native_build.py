"""Building the kernels in C: the cache, and machines where they cannot be had."""
import errno
import os
import platform
import shlex
import time

import pytest
import torch
from ops_testing import NO_COMPILER, assert_as_good_as_eager, make_case

from cpool_vision.ops import available_backends, context_pool2d
from cpool_vision.ops.native import build

CASE = make_case(1, 4, 6, 5)
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason='no C compiler')


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Nothing was built or loaded yet."""
    folder = tmp_path / 'cache'
    monkeypatch.setenv('CPOOL_VISION_CACHE', str(folder))
    build.load.cache_clear()
    yield folder
    build.load.cache_clear()


@pytest.fixture
def quick_build(monkeypatch):
    """Compilation takes a fraction of its time where what the compiler makes is not the point."""
    monkeypatch.setattr(build, 'FLAGS', ('-O0', *(flag for flag in build.FLAGS if flag != '-O3')))


def _reason() -> str | None:
    """Why the kernels cannot be had once a call has asked for them: another backend served it."""
    assert context_pool2d(*CASE[:3]).isfinite().all()
    return available_backends(*CASE[:3])['native']


@needs_compiler
def test_library_is_built_once_and_kept(cache, quick_build):
    assert _reason() is None
    made, = cache.iterdir()
    before = made.stat().st_mtime_ns
    assert build.build() == made
    assert made.stat().st_mtime_ns == before
    assert list(cache.iterdir()) == [made]


@needs_compiler
def test_other_processor_or_flags_get_a_library_of_their_own(cache, quick_build, monkeypatch):
    first = build.build()
    monkeypatch.setattr(build, '_processor', lambda: 'another')
    second = build.build()
    monkeypatch.setattr(build, 'FLAGS', (*build.FLAGS, '-g'))
    assert len({first, second, build.build()}) == 3


def test_machine_without_a_compiler_uses_another_backend(cache, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CC', raising=False)
    assert 'no C compiler was found (install gcc, or name one in CC)' in _reason()
    assert context_pool2d(*CASE[:3]).isfinite().all()
    with pytest.raises(NotImplementedError, match="backend='native' cannot run: no C compiler.*backend=None"):
        context_pool2d(*CASE[:3], backend='native')


@needs_compiler
def test_failing_compiler_is_quoted_and_leaves_nothing(cache, monkeypatch, tmp_path):
    broken = tmp_path / 'broken.c'
    broken.write_text('int f( {', encoding='utf-8')
    monkeypatch.setattr(build, 'SOURCE', broken)
    assert 'failed: ' in _reason() and 'error' in _reason()
    assert list(cache.iterdir()) == []


@needs_compiler
def test_folder_that_cannot_be_written_is_named(cache):
    cache.write_text('a file stands here', encoding='utf-8')
    assert 'CPOOL_VISION_CACHE' in _reason()
    assert cache.read_text(encoding='utf-8') == 'a file stands here'


@needs_compiler
@pytest.mark.parametrize('damage', [lambda data: b'', lambda data: data[:len(data) // 2], lambda data: b'no library'])
def test_damaged_library_is_built_again_and_said(cache, quick_build, caplog, damage):
    path = build.build()
    path.write_bytes(damage(path.read_bytes()))
    assert _reason() is None
    line, = caplog.messages
    assert line == f'the compiled library {path} is damaged and is built again'
    made, = cache.iterdir()
    assert made.stat().st_size > 10_000


@needs_compiler
def test_folder_and_library_are_the_users_alone(cache, quick_build):
    made = build.build()
    assert cache.stat().st_mode & 0o777 == made.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize('what', ['folder', 'library'])
def test_what_others_may_write_is_not_loaded(cache, quick_build, what):
    made = build.build()
    path = cache if what == 'folder' else made
    path.chmod(0o777)
    assert f'{path} may be written by others (chmod go-w)' in _reason()
    assert made.exists()


@needs_compiler
@pytest.mark.parametrize('what', ['folder', 'library'])
def test_what_another_user_owns_is_not_loaded(cache, quick_build, monkeypatch, what):
    made = build.build()
    path, lstat = cache if what == 'folder' else made, type(cache).lstat

    def foreign(self):
        facts = lstat(self)
        return os.stat_result((*facts[:4], facts.st_uid + 1, *facts[5:10])) if self == path else facts

    monkeypatch.setattr(type(cache), 'lstat', foreign)
    assert f'{path} belongs to another user' in _reason()


@needs_compiler
@pytest.mark.parametrize('what', ['folder', 'library'])
def test_symbolic_links_are_not_followed(cache, quick_build, tmp_path, what):
    made = build.build()
    path = cache if what == 'folder' else made
    path.rename(tmp_path / 'elsewhere')
    path.symlink_to(tmp_path / 'elsewhere')
    assert f'{path} is a symbolic link' in _reason()


@needs_compiler
def test_what_a_killed_compilation_left_is_swept(cache, quick_build):
    cache.mkdir(mode=0o700)
    for name, age in (('build-old', 2 * build.SCRATCH_AGE_S), ('build-new', 0)):
        folder = cache / name
        folder.mkdir()
        (folder / 'cc1.s').write_text('half')
        os.utime(folder, (time.time() - age,) * 2)
    made = build.build()
    assert sorted(cache.iterdir()) == sorted([cache / 'build-new', made])


@needs_compiler
def test_compilation_that_finds_no_space_leaves_nothing(cache, quick_build, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(build, '_sync', full)
    assert 'No space left on device' in _reason() and 'CPOOL_VISION_CACHE' in _reason()
    assert list(cache.iterdir()) == []


def test_folder_of_the_cache(monkeypatch, tmp_path):
    for name in ('CPOOL_VISION_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert build.cache_folder() == tmp_path / '.cache' / 'cpool_vision'
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
    assert build.cache_folder() == tmp_path / '.cache' / 'cpool_vision'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert build.cache_folder() == tmp_path / 'xdg' / 'cpool_vision'
    monkeypatch.setenv('CPOOL_VISION_CACHE', 'relative')
    with pytest.raises(build.BuildError, match='CPOOL_VISION_CACHE=relative must be an absolute path'):
        build.cache_folder()


def test_user_without_a_home_uses_another_backend(cache, monkeypatch):
    def no_home():
        raise RuntimeError('Could not determine home directory.')

    for name in ('CPOOL_VISION_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.Path, 'home', no_home)
    monkeypatch.setattr(build, '_compiler', lambda: ['cc'])
    assert 'there is no home folder' in _reason() and 'CPOOL_VISION_CACHE' in _reason()


def test_command_of_a_compiler_that_is_none_is_quoted(cache, monkeypatch):
    monkeypatch.setenv('CC', '"gcc')
    assert _reason() == 'CC="gcc is not a command: No closing quotation'


def test_asking_what_can_run_compiles_nothing(cache, monkeypatch):
    monkeypatch.setattr(build, '_compiler', lambda: ['cc'])
    monkeypatch.setattr(build, '_run', lambda *args, **env: pytest.fail('the compiler was started'))
    assert available_backends(*CASE[:3])['native'] is None
    assert not cache.exists()


def test_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv('CPOOL_VISION_NATIVE', '0')
    assert _reason() == 'CPOOL_VISION_NATIVE=0 turns it off'


@needs_compiler
def test_it_is_preferred_on_the_cpu_but_not_for_double():
    reasons = available_backends(*(t.double() for t in CASE[:3]))
    assert 'float64' in reasons['native'] and reasons['tiled'] is None
    assert next(name for name, reason in available_backends(*CASE[:3]).items() if reason is None) == 'native'


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize('threads', [1, 2, 7])
def test_any_number_of_threads(threads, set_threads):
    set_threads(threads)
    assert_as_good_as_eager(make_case(1, 40, 37, 41, sigma=(0.2, 3.0), seed=threads), 'native')
    assert_as_good_as_eager(make_case(3, 34, 9, 41, groups=2, sigma=(0.2, 3.0), seed=threads), 'native')


@needs_compiler
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('threads', [1, 2, 4])
def test_chunks_of_images_give_the_same(threads, layout, dtype, set_threads, monkeypatch):
    from cpool_vision.ops.native import launch
    set_threads(threads)
    x, weight_logits, sigma, grad = make_case(5, 24, 17, 19)
    x, grad = (t.to(dtype).contiguous(memory_format=layout) for t in (x, grad))

    def run():
        dx, *rest = launch.native_backward(grad, x, weight_logits, sigma, 1)
        y = launch.native_forward(x, weight_logits, sigma, 1)
        for t in (y, dx):
            assert t.dtype == dtype and t.is_contiguous(memory_format=layout)
        return dx, *rest, y

    whole = run()
    monkeypatch.setattr(launch, 'CHUNK_ELEMENTS', 2 * x[0].numel())
    if threads == 1:
        assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))
    else:  # maps fewer than threads are summed in bands
        torch.testing.assert_close(run(), whole)


@needs_compiler
@pytest.mark.parametrize('exponent', [-100, 100])
def test_gradients_of_any_size(exponent):
    from cpool_vision.ops.native import launch
    x, weight_logits, sigma, grad = make_case(1, 12, 13, 15, sigma=(0.3, 3.0))
    weight_logits = 11.9 * weight_logits / weight_logits.abs().max()
    expected = launch.native_backward(grad, x, weight_logits, sigma, 1)
    got = launch.native_backward(grad * 2. ** exponent, x, weight_logits, sigma, 1)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a * 2. ** -exponent, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@needs_compiler
def test_wide_channels_use_every_block_size():
    for channels in (*range(1, 25), 31, 49, 127):
        assert_as_good_as_eager(make_case(1, channels, 19, 23, sigma=(0.2, 2.0), seed=channels), 'native')


@needs_compiler
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='vectors of 8 lanes are the only ones elsewhere')
def test_vectors_of_eight_lanes(cache, monkeypatch):
    monkeypatch.setenv('CC', f'{shlex.join(build._compiler())} -mno-avx512f')
    assert _reason() is None
    for case in (make_case(2, 48, 19, 23, sigma=(0.2, 4.0)), make_case(2, 21, 23, 9, sigma=(0.2, 1.0)),
                 make_case(1, 112, 14, 14, groups=2, sigma=(0.2, 1.4))):
        assert_as_good_as_eager(case, 'native')
    assert_as_good_as_eager(make_case(1, 24, 17, 19, stride=2), 'native', stride=2)
