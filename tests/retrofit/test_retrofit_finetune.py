import copy
import functools
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from cpool_vision.retrofit import (
    add_context_pool,
    context_pools,
    freeze_base,
    param_groups,
    remove_context_pool,
    unfreeze_base,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return add_context_pool(timm.create_model('test_resnet', num_classes=5), img_size=64)


def train(model, steps=2):
    optimizer = create_optimizer_v2(
        model, 'sgd', lr=.1, momentum=.9, param_group_fn=functools.partial(param_groups, weight_decay=1e-3))
    model.train()
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()


def test_every_parameter_is_in_one_group(model):
    groups = param_groups(model, pool_lr_scale=10, lr=.01, weight_decay=.05)
    counts = [id(p) for group in groups for p in group['params']]
    assert sorted(counts) == sorted(id(p) for p in model.parameters())
    table = {group['group_name']: (group['lr'], group['weight_decay']) for group in groups}
    assert table == {'base_decay': (.01, .05), 'base_no_decay': (.01, 0), 'pool_decay': (.1, .05),
                     'pool_no_decay': (.1, 0)}
    pools = {id(p) for pool in context_pools(model).values() for p in pool.parameters()}
    for group in groups:
        assert all((id(p) in pools) == group['group_name'].startswith('pool') for p in group['params'])
        if group['group_name'].endswith('no_decay'):
            assert all(p.ndim <= 1 for p in group['params'])
    groups = param_groups(model, weight_decay=.05, pool_weight_decay=0)
    assert {group['group_name']: group['weight_decay'] for group in groups}['pool_decay'] == 0
    assert 'lr' not in groups[0]


def test_names_that_a_model_does_not_decay():
    model = add_context_pool(timm.create_model('test_vit'))
    groups = {group['group_name']: group['params'] for group in param_groups(model, weight_decay=.1)}
    assert any(p is model.pos_embed for p in groups['base_no_decay'])
    assert not any(p is model.pos_embed for p in groups['base_decay'])


@pytest.mark.parametrize('lr', [None, .01])
def test_schedulers_of_timm_scale_the_groups_once(model, lr):
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=.01, param_group_fn=functools.partial(param_groups, pool_lr_scale=5, lr=lr))
    schedule = CosineLRScheduler(optimizer, t_initial=10)
    for epoch, base in (0, .01), (5, .005):
        schedule.step(epoch)
        rates = {group['group_name'][:4]: group['lr'] for group in optimizer.param_groups}
        assert rates == {'base': pytest.approx(base), 'pool': pytest.approx(5 * base)}


def test_a_frozen_base_stays_put_and_pools_learn(model):
    freeze_base(model)
    before = copy.deepcopy(model.state_dict())
    train(model)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all('.cpool.' in key for key in changed)
    assert set(before) == set(copy.deepcopy(model).state_dict())
    assert isinstance(model.bn1, nn.BatchNorm2d) and not model.bn1.training and model.layer1.training
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model))).train()  # noqa: S301
    assert not copied.bn1.training

    unfreeze_base(model)
    assert model.bn1.training and type(model.bn1) is nn.BatchNorm2d
    train(model)  # the control: statistics and weights move again
    after = model.state_dict()
    assert not torch.equal(before['bn1.running_mean'], after['bn1.running_mean'])
    assert not torch.equal(before['layer1.0.conv1.weight'], after['layer1.0.conv1.weight'])


def test_the_head_can_be_trained_alone_with_the_pools(model):
    freeze_base(model, train_head=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if '.cpool.' not in name} == {'fc.weight', 'fc.bias'}
    groups = {group['group_name']: group['params'] for group in param_groups(model)}
    assert len(groups['base_decay']) == len(groups['base_no_decay']) == 1


def test_a_frozen_base_in_training_mode_predicts_as_in_eval_mode(model):
    x = torch.randn(2, 3, 64, 64)
    freeze_base(model.train())
    assert torch.equal(model.train()(x), model.eval()(x))
    unfreeze_base(model)
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_a_pooled_normalization_can_be_frozen():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    before, keys = model.eval()(x), set(model.state_dict())
    add_context_pool(model, places='layer2.0.bn2', img_size=64)
    freeze_base(model)
    assert isinstance(model.layer2[0].bn2, nn.BatchNorm2d)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert not copied.train().layer2[0].bn2.training
        assert torch.equal(copied.eval()(x), before) and len(context_pools(copied)) == 1
    remove_context_pool(model)
    assert not model.train().layer2[0].bn2.training  # still frozen
    unfreeze_base(model)
    assert model.train().layer2[0].bn2.training and set(model.state_dict()) == keys
    assert type(model.layer2[0].bn2) is type(model.layer2[0].bn1)
    assert torch.equal(model.eval()(x), before)


def test_errors(model):
    bare = timm.create_model('test_resnet')
    for function in (freeze_base, param_groups):
        with pytest.raises(ValueError, match='ResNet has no context pool: call add_context_pool first'):
            function(bare)
    with pytest.raises(ValueError, match='pool_lr_scale must be > 0, got 0'):
        param_groups(model, pool_lr_scale=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match='requires a gradient: call unfreeze_base'):
        param_groups(model)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match='no classifier with parameters: pass train_head=False'):
        freeze_base(model, train_head=True)
