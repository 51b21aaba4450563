"""What a run records, in files and with services, and that a resumed run neither repeats nor loses a step."""
import csv
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from resume_tools import break_off, rows
from timm.utils import unwrap_model

from cpool_vision.engine.device import start_runtime
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.tracking import track
from cpool_vision.engine.tracking.run_lock import RunLock
from cpool_vision.engine.tracking.support_log import measure_supports
from cpool_vision.engine.tracking.table import EpochTable, UpdateTable
from cpool_vision.engine.tracking.track_services import ServiceRuns, TensorBoardTracker
from cpool_vision.engine.train.build import build
from cpool_vision.errors import ConfigError, OutputError
from cpool_vision.inspect import context_maps

Train = Callable[..., dict[str, Any]]
POOLS = [
    '--model', 'resnet_micro_cpool_32', '--model-kwargs', 'channels=[8,8,8,8]', 'layers=[1,1,1,1]', 'cpool_groups=1']
PLAIN = ['--log-interval', '2', '--no-tensorboard']
# three updates an epoch, of which the first and the last are reported
KILLS = ['--epochs', '3', '--recovery-interval', '1', '--experiment', 'x', '--resume', 'auto']


def table(folder: str, name: str) -> list[dict[str, str]]:
    """Rows of a table without what a clock measured."""
    with open(os.path.join(folder, name), newline='', encoding='utf-8') as file:
        return [{key: value for key, value in row.items() if 'per_sec' not in key} for row in csv.DictReader(file)]


@pytest.fixture
def scalars() -> Callable[[str], dict[str, list[tuple[int, float]]]]:
    """Reads a folder of event files as TensorBoard does."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')

    def read(folder: str) -> dict[str, list[tuple[int, float]]]:
        events = accumulator.EventAccumulator(folder)
        events.Reload()
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    return read


def test_files_of_a_run(run_train: Train) -> None:
    folder = run_train(*POOLS, *PLAIN, '--experiment', 'a')['folder']
    updates = table(folder, track.UPDATES)
    assert [(row['update'], row['epoch']) for row in updates] == [('1', '0'), ('3', '0'), ('4', '1'), ('6', '1')]
    supports = table(folder, track.SUPPORTS)
    assert [row['epoch'] for row in supports] == ['0', '0', '1', '1']
    assert len({row['layer'] for row in supports}) == 2
    for row in supports:
        low, middle, high = (float(row[name]) for name in ('q05', 'q50', 'q95'))
        # ratio and floor of these models bound a support, in pixels of the image
        assert 0 < low <= middle <= high < 32 and low * 0.99 <= float(row['mean']) <= high * 1.01
    assert {row['epoch'] for row in rows(folder)} == {'0', '1'}
    assert not os.path.exists(os.path.join(folder, 'tensorboard'))


def test_supports_are_those_of_the_validated_weights(base_flags: list[str]) -> None:
    """By hand, from the definition, on the images of the validation: those of the average where there is one."""
    settings = read_train([*base_flags, *POOLS, *PLAIN, '--model-ema'])
    with RunLock() as lock:
        run = build(settings, start_runtime(settings, join=False), lock)
    run.trackers.close(False)
    assert run.validator is not None
    average: Any = unwrap_model(run.task.get_eval_model(ema=True))
    torch.nn.init.constant_(average.layer3[0].aa.cpool.predict.bias, 1.)
    _, found = run.validator.measure(run.task)
    (images, _), = run.validator.loader
    for each, (layer, maps) in zip(found, context_maps(average, images).items(), strict=True):
        pixels = maps.sigma * 32 / maps.grid[0]
        assert each.layer == layer and each.mean == pytest.approx(pixels.mean().item(), rel=1e-5)
        assert each.q95 == pytest.approx(pixels.quantile(0.95).item(), rel=1e-5)


def test_measuring_draws_no_random_number_and_changes_nothing() -> None:
    import timm

    from cpool_vision.engine.device import Precision

    model = timm.create_model('resnet_micro_cpool_32', num_classes=3).train()
    model.layer3.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    images = torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    assert measure_supports(model, images, Precision(None, torch.bfloat16, 'cpu')) != []
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)  # control: a draw would show
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('update', [2, 3, 4])
def test_tables_of_a_resumed_run_are_those_of_an_undisturbed_one(run_train: Train, update: int) -> None:
    whole = run_train(*POOLS, *PLAIN, '--model-ema', *KILLS[:2], '--experiment', 'whole')['folder']
    flags = [*POOLS, *PLAIN, '--model-ema', *KILLS]
    break_off(lambda: run_train(*flags), update)
    folder = run_train(*flags)['folder']
    for name in ('summary.csv', track.UPDATES, track.SUPPORTS):
        assert table(folder, name) == table(whole, name) != []


def test_what_came_after_the_checkpoint_is_replaced(run_train: Train) -> None:
    """Without checkpoints inside epochs all of the epoch is done again."""
    flags = [*POOLS, *PLAIN, *KILLS, '--recovery-interval', '0']
    break_off(lambda: run_train(*flags), 5)
    folder = os.path.join(run_train(*PLAIN, '--experiment', 'probe', '--epochs', '1')['folder'], '..', 'x')
    assert [row['update'] for row in table(folder, track.UPDATES)] == ['1', '3', '4']
    run_train(*flags)
    assert [row['update'] for row in table(folder, track.UPDATES)] == ['1', '3', '4', '6', '7', '9']
    assert [row['epoch'] for row in table(folder, track.SUPPORTS)] == ['0', '0', '1', '1', '2', '2']


def test_rows_that_are_given_up_are_kept_aside(run_train: Train) -> None:
    folder = run_train(*POOLS, *PLAIN, '--epochs', '3', '--experiment', 'x')['folder']
    with open(os.path.join(folder, 'summary.csv'), encoding='utf-8') as file:
        former = file.read()
    run_train(*POOLS, *PLAIN, '--epochs', '2', '--experiment', 'x', '--resume',
              os.path.join(folder, 'checkpoint-0.pth.tar'))
    assert [row['epoch'] for row in rows(folder)] == ['0', '1']
    with open(os.path.join(folder, 'summary.1.csv'), encoding='utf-8') as file:
        assert file.read() == former
    assert {row['epoch'] for row in table(folder, track.SUPPORTS)} == {'0', '1'}
    assert {row['epoch'] for row in table(folder, 'supports.1.csv')} == {'0', '1', '2'}
    assert len(table(folder, track.UPDATES)) == 4 and len(table(folder, 'updates.1.csv')) == 6


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Any) -> None:
    path = str(tmp_path / 'updates.csv')
    first = UpdateTable(path, 0, 0)
    for update in (1, 2):
        first.add(update, 0, {'loss': 1., 'lr': 0.1, 'images_per_sec': 3.})
    first.close()
    with open(path, 'a') as file:
        file.write('3,0,2.')
    second = UpdateTable(path, 0, 3)
    second.add(3, 0, {'loss': float('nan'), 'lr': 0.1, 'images_per_sec': 3.})
    second.close()
    assert [(row['update'], row['loss']) for row in table(str(tmp_path), 'updates.csv')] == [
        ('1', '1.0'), ('2', '1.0'), ('3', 'nan')]
    with pytest.raises(OutputError, match='cannot be written'):
        UpdateTable(str(tmp_path / 'absent' / 'updates.csv'), 0, 0).add(1, 0, {})


def test_an_epoch_is_written_once(tmp_path: Any) -> None:
    written = EpochTable(str(tmp_path / 't.csv'))
    for value in (1., 2.):
        written.add(0, [{'layer': 'a', 'mean': value}, {'layer': 'b', 'mean': value}])
    assert [row['mean'] for row in table(str(tmp_path), 't.csv')] == ['2.0', '2.0']


@pytest.mark.parametrize('update', [2, 5])
def test_tensorboard_shows_each_step_once(run_train: Train, scalars: Callable[..., Any], update: int) -> None:
    flags = [*POOLS, '--log-interval', '2', *KILLS, '--recovery-interval', '2']
    break_off(lambda: run_train(*flags), update)
    folder = os.path.join(run_train(*flags)['folder'], 'tensorboard')
    updates, epochs = (scalars(os.path.join(folder, name)) for name in ('updates', 'epochs'))
    assert [step for step, _ in updates['loss']] == [1, 3, 4, 6, 7, 9]
    assert {tuple(step for step, _ in values) for values in epochs.values()} == {(0, 1, 2)}
    parent = os.path.dirname(folder)
    assert [value for _, value in epochs['eval_loss']] == pytest.approx([float(r['eval_loss']) for r in rows(parent)])
    layer = table(parent, track.SUPPORTS)[0]
    assert epochs[f'supports/{layer["layer"]}/q95'][0][1] == pytest.approx(float(layer['q95']))


def test_the_reader_sees_repeated_steps(tmp_path: Any, scalars: Callable[..., Any]) -> None:
    """Control: without the mark of what is void, steps come twice."""
    for first in (3, 2):
        tracker = TensorBoardTracker.open(str(tmp_path), 0, 10)
        assert tracker is not None
        for update in range(first, 5):
            tracker.log_update(update, 0, {'loss': 1.})
        tracker.close(False)
    assert [step for step, _ in scalars(str(tmp_path / 'tensorboard' / 'updates'))['loss']] == [3, 4, 2, 3, 4]


def test_no_tensorboard_writes_no_event_files(run_train: Train) -> None:
    pytest.importorskip('tensorboard')
    folder = run_train('--epochs', '1', '--no-tensorboard', '--experiment', 'a')['folder']
    assert 'tensorboard' not in os.listdir(folder)
    assert 'tensorboard' in os.listdir(run_train('--epochs', '1', '--experiment', 'b')['folder'])
    assert track.UPDATES in os.listdir(folder) and track.SUPPORTS not in os.listdir(folder)  # it has no pools


def test_missing_tensorboard_is_a_note(run_train: Train, monkeypatch: pytest.MonkeyPatch,
                                       caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with caplog.at_level('INFO'):
        folder = run_train('--epochs', '1')['folder']
    assert 'TensorBoard is not installed (pip install tensorboard)' in caplog.text
    assert 'tensorboard' not in os.listdir(folder)


class FakeWandb:
    """Takes what wandb takes, and refuses steps that lie back as it does."""

    def __init__(self, step: int = 0) -> None:
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.codes: list[int] = []
        self.step = step

    def init(self, **settings: Any) -> Any:
        self.settings = settings
        return types.SimpleNamespace(id=settings['id'] or 'abc', step=self.step)

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.logged or step >= self.logged[-1][0]
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def test_wandb_gets_everything_once(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*POOLS, *PLAIN, *KILLS, '--recovery-interval', '2', '--log-wandb', '--wandb-project', 'p', '--wandb-tags',
             'a', 'b']
    first = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', first)
    break_off(lambda: run_train(*flags), 4)
    assert first.settings['project'] == 'p' and first.settings['tags'] == ['a', 'b'] and first.settings['id'] is None
    assert first.codes == [1]

    second = FakeWandb(step=first.logged[-1][0] + 1)
    monkeypatch.setitem(sys.modules, 'wandb', second)
    result = run_train(*flags)
    assert second.settings['id'] == 'abc' and second.settings['resume'] == 'allow' and second.codes == [0]
    logged = [*first.logged, *second.logged]
    assert [step for step, values in logged if 'update/loss' in values] == [1, 3, 4, 6, 7, 9]
    epochs = [values for _, values in logged if 'epoch' in values]
    assert [values['epoch'] for values in epochs] == [0, 1, 2]
    last = result['epochs'][-1]
    assert {key: epochs[-1][key] for key in last} == last and any(key.startswith('supports/') for key in epochs[-1])

    third = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', third)
    run_train(*flags, '--wandb-resume-id', 'mine')
    assert third.settings['id'] == 'mine' and third.settings['resume'] == 'must'
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ConfigError, match='pip install wandb'):
        run_train('--log-wandb')


class FakeMlflow:
    """The part of mlflow that is used; runs outlive the process."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[str, float, int]]] = {}
        self.params: dict[str, str] = {}
        self.active = ''
        self.ends: list[str] = []
        self.MlflowClient = lambda: self

    def start_run(self, run_id: str = '', run_name: str = '') -> Any:
        self.active = run_id or f'run-{len(self.runs)}-{run_name}'
        self.runs.setdefault(self.active, [])
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.active))

    def log_params(self, params: dict[str, str]) -> None:
        assert not set(params) & set(self.params)
        self.params.update(params)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.runs[self.active] += [(key, float(value), step) for key, value in metrics.items()]

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [types.SimpleNamespace(step=step) for name, _, step in self.runs[run_id] if name == key]

    def end_run(self, status: str) -> None:
        self.ends.append(status)


def test_mlflow_gets_everything_once(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*POOLS, *PLAIN, *KILLS, '--recovery-interval', '0', '--log-mlflow']
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, 'mlflow', fake)
    break_off(lambda: run_train(*flags), 5)
    run_train(*flags)
    assert list(fake.runs) == ['run-0-x'] and fake.ends == ['FAILED', 'FINISHED']
    assert fake.params['model'] == 'resnet_micro_cpool_32'
    steps: dict[str, list[int]] = {}
    for key, _, step in fake.runs['run-0-x']:
        steps.setdefault(key, []).append(step)
    assert steps['update/loss'] == [1, 3, 4, 6, 7, 9] and steps['eval_top1'] == [0, 1, 2]
    assert sum(key.startswith('supports/') for key in steps) == 8
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(ConfigError, match='pip install mlflow'):
        run_train('--log-mlflow')


def test_a_service_that_cannot_start_is_an_error(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError('no API key')

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=refuse))
    monkeypatch.setitem(sys.modules, 'mlflow', types.SimpleNamespace(start_run=refuse))
    with pytest.raises(ConfigError, match='no API key.*WANDB_MODE'):
        run_train('--log-wandb', '--no-tensorboard', '--experiment', 'a')
    with pytest.raises(ConfigError, match='no API key.*MLFLOW_TRACKING_URI'):
        run_train('--log-mlflow', '--no-tensorboard', '--experiment', 'b')


def test_a_service_that_fails_later_does_not_stop_the_run(
        run_train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FakeWandb):
        def log(self, values: dict[str, Any], step: int) -> None:
            raise ConnectionError('the network is down')

    fake = Failing()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    result = run_train(*PLAIN, '--log-wandb')
    assert len(result['epochs']) == 2 and caplog.text.count('Weights & Biases failed') == 1
    assert 'the network is down' in caplog.text and fake.codes == []


def test_names_of_runs_that_cannot_be_read_are_forgotten(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / 'tracking.json').write_text('[1]')
    assert ServiceRuns(str(tmp_path), True).names == {} and 'tracking.json' in caplog.text
