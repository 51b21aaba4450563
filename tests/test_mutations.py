"""Faults seeded into a copy of the package: the test named beside each must fail.

Faults are found by the text of the source, once in its file. After a refactoring, give the new text.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
VALUES = 'ops/test_operator_values.py'
LAYER = 'layers/test_context_pool.py'
TOKENS = 'layers/test_token_context_pool.py'
ENGINE = 'engine/'
ACCUMULATION = ENGINE + 'train/test_engine_accumulation.py'
RESUME = ENGINE + 'train/test_engine_resume.py'
SAMPLING = ENGINE + 'data/test_engine_sampling.py'
SAVING = ENGINE + 'checkpoints/test_engine_saving.py'


class Fault(NamedTuple):
    """Text of a file of the package, what stands there instead, and the test that must notice."""
    file: str
    text: str
    wrong: str
    test: str


FAULTS = {
    # the operator
    'exponent without its half': Fault(
        'ops/reference.py', 'inverse.square() * -0.5', 'inverse.square() * -1.0',
        LAYER + '::test_output_is_the_definition_on_predicted_maps'),
    'cells off their center': Fault(
        'ops/reference.py', 'torch.arange(out_size, device=device) + (stride - 1))',
        'torch.arange(out_size, device=device) + stride)',
        VALUES + '::TestProperties::test_small_supports_give_the_identity'),
    'too much left out': Fault(
        'ops/plan.py', 'mul_(tolerance / 4)', 'mul_(tolerance * 4096)', VALUES + '::test_truncated_share_is_certified'),
    'product without its mean': Fault(
        'ops/tiled.py', 'u.addcmul_(pairs, u.sum(-1, keepdim=True), value=-1)', 'u.sum(-1)',
        VALUES + '::test_random_shapes'),
    'bands that overwrite each other': Fault(
        'ops/tiled.py', 'dx[bs, :, :, xs] += dfeatures', 'dx[bs, :, :, xs] = dfeatures',
        VALUES + '::test_errors_stay_within_twice_those_of_dense_eager'),
    'a refused backend runs': Fault(
        'ops/backends.py', '    if reason is not None:\n        raise NotImplementedError',
        '    if False:\n        raise NotImplementedError', 'ops/test_operator_contract.py::test_backends_say_why_not'),
    # the layer
    'logits without bound': Fault(
        'ops/maps.py', 'if bound > 0:\n        weight_logits.div_', 'if bound < 0:\n        weight_logits.div_',
        LAYER + '::test_logits_are_bounded_smoothly'),
    'a bound kept for weights that had none': Fault(
        'layers/context_pool.py', 'self.bound = float(state_dict.setdefault(', 'float(state_dict.setdefault(',
        LAYER + '::test_a_state_dict_without_a_bound_makes_the_layer_unbounded'),
    'absent pixels weigh something': Fault(
        'layers/context_pool.py', 'weight_logits.masked_fill(~present, -float(\'inf\'))', 'weight_logits',
        'layers/test_naflex_context_pool.py::test_missing_tokens_are_as_the_border'),
    'gate the wrong way round': Fault(
        'ops/layer.py', 'torch.lerp(base, y, gate, out=y)', 'torch.lerp(y, base, gate, out=y)',
        LAYER + '::test_identity_returns_its_base_bit_for_bit_until_the_gate_opens'),
    'gate of tokens the wrong way round': Fault(
        'ops/layer.py', 'torch.lerp(base, y, gate, out=y)', 'torch.lerp(y, base, gate, out=y)',
        TOKENS + '::test_identity_returns_its_input'),
    'prefix tokens are pooled': Fault(
        'layers/token_context_pool.py', 'features = torch.ops.cpool_vision.to_autocast(x)',
        'features = torch.ops.cpool_vision.to_autocast(x.roll(1, 1))',
        TOKENS + '::test_tokens_are_pooled_as_a_map_and_prefix_tokens_pass'),
    # the engine
    'gradients are summed, not averaged': Fault(
        'engine/train/loop.py', '_batch_scale(run, len(target)) / group_size(step, batches, accum)',
        '_batch_scale(run, len(target))', ACCUMULATION),
    'clipping is left out': Fault(
        'engine/train/loop.py', 'if settings.clip_grad is not None:', 'if False:',
        ENGINE + 'train/test_engine_run_flags.py::test_how_gradients_are_clipped'),
    'random numbers go on from the last batch': Fault(
        'engine/train/loop.py', 'seed_everything(settings.seed, runtime.rank, epoch, step + 1)', 'pass',
        RESUME + '::test_a_run_that_breaks_off_inside_an_epoch_ends_as_the_uninterrupted_one[plain-1-stops0]'),
    'statistics keep a trace of a skipped update': Fault(
        'engine/train/loop.py', 'buffers.restore()\n    if run', 'pass\n    if run',
        ENGINE + 'train/test_engine_nonfinite.py::test_a_skipped_update_leaves_no_trace'),
    'every process takes the same images': Fault(
        'engine/data/sampling.py', '* self.world_size + self.rank', '* self.world_size',
        SAMPLING + '::test_each_image_comes_once_per_epoch'),
    'a resumed epoch begins at its first image': Fault(
        'engine/data/sampling.py', 'start = sum(size for _, size in plan[:first])', 'start = 0',
        SAMPLING + '::test_a_position_gives_the_tail'),
    'one bad process is outvoted': Fault(
        'engine/distributed/vote.py', 'all_reduce(flags, op=torch.distributed.ReduceOp.MIN)',
        'all_reduce(flags, op=torch.distributed.ReduceOp.MAX)', ENGINE + 'distributed/test_engine_agreement.py'),
    'hashes are not compared': Fault(
        'engine/checkpoints/seal.py', 'if sha256.hexdigest() != seal.sha256:', 'if False:',
        SAVING + '::test_damaged_files_are_passed_over_and_named'),
    'one checkpoint to resume from': Fault(
        'engine/checkpoints/saver.py', 'key=serial_of, reverse=True)[:2]', 'key=serial_of, reverse=True)[:1]',
        RESUME + '::test_the_newest_two_stay'),
    'the optimizer is not restored': Fault(
        'engine/checkpoints/saver.py', 'self.optimizer.load_state_dict(divide_optimizer_state(',
        '(divide_optimizer_state(',
        RESUME + '::test_a_run_that_breaks_off_inside_an_epoch_ends_as_the_uninterrupted_one[plain-1-stops0]'),
    'padding is scored': Fault(
        'engine/validate/evaluate.py', 'output, target = output[:len(positions)], target[:len(positions)]', 'pass',
        ENGINE + 'validate/test_engine_metrics.py::test_processes_change_no_digit'),
    'the mirror image is the image': Fault(
        'engine/validate/evaluate.py', 'image.flip(-1)', 'image',
        ENGINE + 'validate/test_engine_metrics.py::test_mirror_images'),
}


@pytest.fixture(scope='module')
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests need."""
    folder = tmp_path_factory.mktemp('mutations')
    for name in ('cpool_vision', 'tests', 'benchmarks'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.npz', '*.png'))
    for name in ('pyproject.toml', 'train.py', 'validate.py'):
        shutil.copy(ROOT / name, folder)
    return folder


def run_tests(folder: Path, *tests: str) -> tuple[int, str]:
    """Exit status and output of pytest; 0: all passed, 1: some failed."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *(f'tests/{test}' for test in tests)],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, 'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1', 'OMP_NUM_THREADS': '1'})
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize('name', FAULTS)
def test_the_text_of_a_fault_is_unique(name: str) -> None:
    fault = FAULTS[name]
    assert (ROOT / 'cpool_vision' / fault.file).read_text(encoding='utf-8').count(fault.text) == 1


@pytest.mark.slow
def test_without_a_fault_the_named_tests_pass(copy: Path) -> None:
    status, output = run_tests(copy, *sorted({fault.test for fault in FAULTS.values()}))
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_noticed(copy: Path, name: str) -> None:
    fault = FAULTS[name]
    path = copy / 'cpool_vision' / fault.file
    sound = path.read_text(encoding='utf-8')
    path.write_text(sound.replace(fault.text, fault.wrong), encoding='utf-8')
    try:
        status, output = run_tests(copy, fault.test)
    finally:
        path.write_text(sound, encoding='utf-8')
    assert status == 1 and ' error' not in output.splitlines()[-1], output
