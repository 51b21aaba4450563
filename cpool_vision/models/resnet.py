"""ResNets with context pooling.

ResNet: `Deep Residual Learning for Image Recognition`, https://arxiv.org/abs/1512.03385
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from timm.models import ResNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from ..layers import Subsample2d, create_mixer
from ._builder import build_variant, check_placed, init_mixers, variant_cfgs
from ._compat import register_model
from ._family import Family, PoolConfig

__all__ = ['ContextPoolResNet']

# At 224 pixels the first stage holds 56 x 56 maps, where a pool can cost more than the rest of its stage; with 512
# channels at 28 x 28 the second would carry most of the multiply-adds.
FAMILY = Family(
    'resnet', positions=('stride', 'branch', 'stem', 'shortcut'), stages=(2, 3), groups=16,
    former_positions={'stage': 'branch'})


class ContextPoolBasicBlock(BasicBlock):
    """timm's `BasicBlock` with a pool (`cpool`) of its residual branch, before the addition."""

    if TYPE_CHECKING:  # TorchScript reads annotations
        cpool: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        y = self.bn2(self.conv2(y))
        if self.se is not None:
            y = self.se(y)  # type: ignore[misc]
        y = self.cpool(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return self.act2(y + (x if self.downsample is None else self.downsample(x)))


class ContextPoolBottleneck(Bottleneck):
    """timm's `Bottleneck` with a pool (`cpool`) of its residual branch, before the addition."""

    if TYPE_CHECKING:  # TorchScript reads annotations
        cpool: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(y)))))  # type: ignore[misc]
        y = self.bn3(self.conv3(y))
        if self.se is not None:
            y = self.se(y)  # type: ignore[misc]
        y = self.cpool(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return self.act3(y + (x if self.downsample is None else self.downsample(x)))


# Slots of timm's that named a pool before every pool was called `cpool`.
_FORMER_SLOTS = re.compile(r'(^|.*\.)(?:(layer\d+\.\d+)\.se|(layer\d+\.\d+\.aa|maxpool))'
                           r'\.((?:reduce|predict|base|local)\..*|gamma|support)$')


def rename_former_keys(state_dict: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """The state dict with the pools of former checkpoints (in `se`, `aa` and `maxpool`) under their present names."""
    renamed = {}
    for key, value in state_dict.items():
        match = _FORMER_SLOTS.match(key) if key.startswith(prefix) else None
        renamed[f'{match[1]}{match[2] or match[3]}.cpool.{match[4]}' if match else key] = value
    return renamed


def _rename_on_loading(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    renamed = rename_former_keys(state_dict, prefix)
    if renamed.keys() != state_dict.keys():
        state_dict.clear()
        state_dict.update(renamed)


class ContextPoolResNet(ResNet):
    """timm's `ResNet` with context pools.

    Positions: `stride` pools after the strided 3x3 convolution of a stage's first block, which then runs at stride 1;
    `branch` pools the residual branch of the last block of each stage, before the addition (stride 1); `stem` replaces
    the max-pool of the stem; `shortcut` pools before the 1x1 convolution of the strided shortcut. With
    `init='identity'` each starts as the module that it replaced.

    Args:
        *args, **kwargs: As for `ResNet`.
        small_stem: The stem keeps the resolution: its convolutions run at stride 1, without a pool after them.
        cpool: Where and how to pool; the defaults of the family if None.

    Raises:
        ValueError: A slot that a position needs is absent or already taken by an `aa_layer`.
    """

    def __init__(
            self,
            *args: Any,
            small_stem: bool = False,
            cpool: PoolConfig | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        positions = cpool.positions
        pool_args = dict(cpool.layer_args, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        if small_stem:
            self._keep_resolution()
        if 'stem' in positions:
            if not isinstance(self.maxpool, nn.MaxPool2d):
                raise ValueError(
                    f"position 'stem' replaces the stem's max-pool, but this model has {type(self.maxpool).__name__} "
                    f'there: leave the position out')
            dim: Any = self.bn1.num_features
            pool = create_mixer(dim, stride=2, base=self.maxpool, **pool_args)
            self.maxpool = _named(pool)  # type: ignore[assignment]
        for i in cpool.stages:
            stage = getattr(self, f'layer{i + 1}')
            if 'branch' in positions:
                _pool_branch(stage[-1], pool_args)
            if 'stride' in positions and stage[0].stride == 2:
                _pool_stride(stage[0], pool_args)
            if 'shortcut' in positions and stage[0].stride == 2:
                stage[0].downsample = _pool_shortcut(stage[0].downsample, pool_args)
        self.register_load_state_dict_pre_hook(_rename_on_loading)
        check_placed(self, cpool)

    def _keep_resolution(self) -> None:
        for module in self.conv1.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for i, info in enumerate(self.feature_info):
            info['reduction'] = max(1, 2 ** (i - 1))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        init_mixers(self)


def _named(pool: nn.Module) -> nn.Sequential:
    """A slot of timm's that holds `pool` under the name that pools have everywhere."""
    return nn.Sequential(OrderedDict(cpool=pool))


def _pool_branch(block: Any, pool_args: dict[str, Any]) -> None:
    bottleneck = isinstance(block, Bottleneck)
    # timm's stage builds its blocks itself: changing classes keeps weights and names.
    block.__class__ = ContextPoolBottleneck if bottleneck else ContextPoolBasicBlock
    block.cpool = create_mixer((block.bn3 if bottleneck else block.bn2).num_features, **pool_args)


def _pool_stride(block: Any, pool_args: dict[str, Any]) -> None:
    if not isinstance(block.aa, nn.Identity):
        raise ValueError(
            f"position 'stride' needs the anti-aliasing slot of the block, which holds {type(block.aa).__name__}: "
            f'leave aa_layer or the position out')
    conv: Any = block.conv2 if isinstance(block, Bottleneck) else block.conv1
    conv.stride = (1, 1)
    dim: Any = conv.out_channels
    block.aa = _named(create_mixer(dim, stride=2, base=Subsample2d(2), **pool_args))


def _pool_shortcut(shortcut: nn.Sequential, pool_args: dict[str, Any]) -> nn.Sequential:
    conv: Any = shortcut[0]
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1):
        raise ValueError("position 'shortcut' needs a strided 1x1 convolution there: leave avg_down, down_kernel_size "
                         'or the position out')
    conv.stride = (1, 1)
    dim: Any = conv.in_channels
    pool = create_mixer(dim, stride=2, base=Subsample2d(2), **pool_args)
    # The base's own names stay, so that its weights load.
    return nn.Sequential(OrderedDict([('cpool', pool), *shortcut.named_children()]))


def _create_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ContextPoolResNet:
    return build_variant(
        ContextPoolResNet,
        FAMILY,
        variant,
        pretrained,
        base_filter=lambda state_dict, _: rename_former_keys(state_dict),
        **kwargs,
    )


default_cfgs = variant_cfgs(
    bases={f'resnet{n}_cpool': f'resnet{n}' for n in (18, 34, 50, 101)},
    own={
        'resnet_micro_cpool_32.untrained': dict(
            num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, interpolation='bicubic',
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='conv1.0', classifier='fc', license='apache-2.0'),
    },
)


@register_model
def resnet_micro_cpool_32(pretrained: bool = False, **kwargs: Any) -> ContextPoolResNet:
    """ResNet of 1.1 M parameters for 32 x 32 images: three 3x3 stem convolutions at full resolution, no stem pool."""
    model_args = dict(
        block=BasicBlock, layers=(2, 2, 2, 2), channels=(32, 64, 96, 128), stem_type='deep', stem_width=16,
        small_stem=True)
    return _create_resnet('resnet_micro_cpool_32', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolResNet:
    """ResNet-18 with context pooling."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_resnet('resnet18_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolResNet:
    """ResNet-34 with context pooling."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_resnet('resnet34_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolResNet:
    """ResNet-50 with context pooling."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_resnet('resnet50_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolResNet:
    """ResNet-101 with context pooling."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_resnet('resnet101_cpool', pretrained, **dict(model_args, **kwargs))
