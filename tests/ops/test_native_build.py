"""Building the kernels in C: the cache, and machines where they cannot be had."""
import platform
import shlex

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
def test_damaged_library_is_a_reason_not_a_crash(cache, quick_build):
    path = build.build()
    path.write_bytes(b'not a library')
    build.load.cache_clear()
    assert 'does not load' in _reason()


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
@pytest.mark.parametrize('threads', [1, 2, 4])
def test_chunks_of_images_give_the_same(threads, set_threads, monkeypatch):
    from cpool_vision.ops.native import launch
    set_threads(threads)
    case = make_case(5, 24, 17, 19)

    def run():
        return *launch.native_backward(case[3], *case[:3], 1), launch.native_forward(*case[:3], 1)

    whole = run()
    monkeypatch.setattr(launch, 'CHUNK_ELEMENTS', 2 * case[0][0].numel())
    if threads == 1:
        assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))
    else:  # maps fewer than threads are summed in bands
        torch.testing.assert_close(run(), whole)


@needs_compiler
def test_wide_channels_use_every_block_size():
    for channels in (1, 5, 16, 31, 49, 127):
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
