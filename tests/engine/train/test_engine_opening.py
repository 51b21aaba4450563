"""What a run says before it starts, which epochs one call trains and keeps, and the result that it prints."""
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpool_vision.cli.train import best_epochs
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.train.opening import changed_settings, describe_optimizer, describe_schedule

Run = Callable[..., dict[str, Any]]


def test_a_run_names_input_optimizer_and_schedule(run_train: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run_train('--epochs', '1', '--min-lr', '1e-6', '--experiment', 'x')
    text = caplog.text
    assert 'Input: input_size (3, 32, 32)' in text and 'mean (' in text and 'crop_pct' in text
    assert 'Optimizer: AdamW, lr 0.001' in text and 'weight decay 0 on' in text and '2e-05 on' in text
    assert 'Schedule: cosine, 1 epochs, floor 1e-06, stepped per epoch' in text
    assert 'fills all' not in text
    caplog.clear()
    run_train('--warmup-epochs', '2', '--epochs', '2', '--experiment', 'x', '--resume', 'auto')
    assert 'warm-up of 2 epochs fills all 2 epochs' in caplog.text
    # what differs from the saved run is listed, and nothing else
    listed = next(each.getMessage() for each in caplog.records if 'other settings' in each.getMessage())
    assert listed.endswith(': --epochs 1 -> 2, --min-lr 1e-06 -> 0, --warmup-epochs 0 -> 2.')


def test_layers_may_have_rates_of_their_own() -> None:
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([{'params': [first], 'lr': .1, 'weight_decay': .5}, {'params': [second]}], lr=.4)
    text = describe_optimizer(optimizer)
    assert text.startswith('SGD, lr 0.4 (down to 0.1 by layer)')
    assert text.endswith('0.5 on 3 parameters, 0 on 4 parameters')
    assert describe_schedule(TrainSettings(sched='none'), 3) == '3 epochs'
    prefixed = TrainSettings(warmup_prefix=True, cooldown_epochs=2, sched_on_updates=True)
    assert describe_schedule(prefixed, 307) == (
        '307 epochs, 5 of warm-up from 1e-05 before the schedule, 2 of cooldown, floor 0, stepped per update')


def test_only_settings_that_matter_are_changes() -> None:
    saved = {'args': {'lr': .1, 'scale': [.08, 1.], 'output': 'a', 'model_kwargs': {'depth': 2}, 'drop': .1}}
    now = TrainSettings(lr=None, output='b', workers=3, model_kwargs={'depth': 2})
    assert changed_settings(now, saved) == {'drop': (.1, 0.)}
    assert changed_settings(now, {}) == {}


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run_train: Run, load: Callable[..., Any],
                                                        caplog: pytest.LogCaptureFixture) -> None:
    whole = run_train('--epochs', '4', '--experiment', 'whole')
    part = run_train('--epochs', '4', '--stop-epoch', '2', '--save-epochs', '1', '--checkpoint-hist', '1',
                     '--experiment', 'part')
    assert [row['epoch'] for row in part['epochs']] == [0, 1]
    assert [row['lr'] for row in part['epochs']] == [row['lr'] for row in whole['epochs'][:2]]
    caplog.clear()
    rest = run_train('--epochs', '4', '--save-epochs', '1', '3', '--checkpoint-hist', '1', '--experiment', 'part',
                     '--resume', 'auto')
    assert 'other settings' not in caplog.text
    assert [row['epoch'] for row in rest['epochs']] == [2, 3]
    ends = [load(each['folder'], 'last.pth.tar')['state_dict'] for each in (whole, rest)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    kept = {name for name in os.listdir(rest['folder']) if name.startswith(('milestone', 'checkpoint'))}
    assert {'milestone-1.pth.tar', 'milestone-3.pth.tar'} < kept and len(kept) == 3
    assert [load(rest['folder'], f'milestone-{done}.pth.tar')['epoch'] for done in (1, 3)] == [0, 2]


def test_an_epoch_that_is_kept_is_validated(run_train: Run) -> None:
    result = run_train('--epochs', '3', '--val-interval', '3', '--save-epochs', '2')
    assert ['eval_top1' in row for row in result['epochs']] == [False, True, True]
    assert os.path.exists(os.path.join(result['folder'], 'milestone-2.pth.tar'))


def test_nothing_is_trained_behind_the_stop(run_train: Run, caplog: pytest.LogCaptureFixture) -> None:
    run_train('--epochs', '3', '--stop-epoch', '1', '--experiment', 'x')
    again = run_train('--epochs', '3', '--stop-epoch', '1', '--experiment', 'x', '--resume', 'auto')
    assert again['epochs'] == [] and 'raise --stop-epoch' in caplog.text


@pytest.mark.parametrize('metric, order', [('top1', [0, 2, 1]), ('loss', [0, 1, 2])])
def test_the_result_has_the_form_of_timm(metric: str, order: list[int]) -> None:
    rows = [{'epoch': epoch, 'train_loss': loss, 'eval_loss': loss, 'eval_top1': top1, 'lr': .1}
            for epoch, (loss, top1) in enumerate([(3., 10.), (2., 30.), (1., 20.)])]
    printed = best_epochs({'metric': metric, 'epochs': rows, 'folder': 'x'})
    assert [each['epoch'] for each in printed] == order
    assert printed[-1]['validation'].keys() == {'loss', 'top1'} and printed[0]['train'] == {'loss': 3.}
    many = [{'epoch': epoch, 'train_loss': 1. / (epoch + 1), 'lr': .1} for epoch in range(12)]
    assert [each['epoch'] for each in best_epochs({'metric': 'loss', 'epochs': many})] == list(range(2, 12))
    assert best_epochs({'metric': 'loss', 'epochs': many})[0].keys() == {'epoch', 'train'}
