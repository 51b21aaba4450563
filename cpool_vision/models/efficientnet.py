"""EfficientNets with context pooling.

EfficientNet: `Rethinking Model Scaling for Convolutional Neural Networks`, https://arxiv.org/abs/1905.11946
EfficientNet-Lite: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from timm.models import EfficientNet
from torch import Tensor, nn

from ..layers import Subsample2d, create_mixer
from ._builder import build_variant, check_placed, variant_cfgs
from ._compat import (
    BN_EPS_TF_DEFAULT,
    decode_arch_def,
    register_model,
    resolve_act_layer,
    resolve_bn_args,
    round_channels,
)
from ._family import Family, PoolConfig

__all__ = ['ContextPoolEfficientNet']

# At 224 pixels the first stage holds 56 x 56 maps, where a pool can cost more than the rest of its stage. 8 groups
# divide all widths of the family.
FAMILY = Family('efficientnet', positions=('pre_block', 'stride'), stages=(1, 2, 3), groups=8)


class SameSubsample2d(nn.Module):
    """Selects the pixels of a stride-1 convolution that TensorFlow's "same" padding computes at stride 2.

    That padding is asymmetric if a side is even: the kernels are then centered on odd rows or columns.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 1 - x.shape[-2] % 2::2, 1 - x.shape[-1] % 2::2]


class ContextPoolEfficientNet(EfficientNet):
    """timm's `EfficientNet` with context pools.

    A stage is all blocks of one resolution: stage `i` ends at a map `2 ** (i + 2)` times coarser than the image.
    Positions: `pre_block` pools the input of each stage's last block; `stride` pools after the strided depthwise
    convolution of a stage's first block, which then runs at stride 1. With `init='identity'` both start as the base.

    Args:
        *args, **kwargs: As for `EfficientNet`.
        cpool: Where and how to pool; the defaults of the family if None.

    Raises:
        ValueError: The slot that `stride` needs is taken by an `aa_layer`.
    """

    def __init__(self, *args: Any, cpool: PoolConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        pool_args = dict(cpool.layer_args, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        base = SameSubsample2d if kwargs.get('pad_type') == 'same' else partial(Subsample2d, 2)
        reductions: Any = [info['reduction'] for info in self.feature_info]
        ends: Any = [info['stage'] - 1 for info in self.feature_info]
        for i in cpool.stages:
            if 2 ** (i + 2) not in reductions:
                raise ValueError(f'stage {i} has no map of its own at output_stride={max(reductions)}: leave it out of '
                                 f'cpool_stages')
            level = reductions.index(2 ** (i + 2))
            if 'pre_block' in cpool.positions:
                _pool_last_block(self.blocks, ends[level], pool_args)
            if 'stride' in cpool.positions:
                _pool_stride(self.blocks[ends[level - 1] + 1], base, pool_args)
        check_placed(self, cpool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As in timm's class; a stage's pool belongs to the group of the block after it."""
        matcher = super().group_matcher(coarse=coarse)
        if not coarse:
            stages: Any = self.blocks
            matcher['blocks'] = [
                (rf'^blocks\.({i})\.cpool', (len(stage) - 2,)) for i, stage in enumerate(stages)
                if hasattr(stage, 'cpool')
            ] + list(matcher['blocks'])
        return matcher


def _pool_last_block(stages: Any, index: int, pool_args: dict[str, Any]) -> None:
    *blocks, (name, last) = stages[index].named_children()
    conv: Any = last.conv_pw
    # the base's own names stay, so that its weights load
    stages[index] = nn.Sequential(OrderedDict(
        [*blocks, ('cpool', create_mixer(conv.in_channels, **pool_args)), (name, last)]))


def _pool_stride(stage: Any, base: Any, pool_args: dict[str, Any]) -> None:
    block = stage[0]
    if not isinstance(block.aa, nn.Identity):
        raise ValueError(
            f"position 'stride' needs the anti-aliasing slot of the block, which holds {type(block.aa).__name__}: "
            f'leave aa_layer or the position out')
    block.conv_dw.stride = (1, 1)
    pool = create_mixer(block.conv_dw.out_channels, stride=2, base=base(), **pool_args)
    block.aa = nn.Sequential(OrderedDict(cpool=pool))


def _create_efficientnet(
        variant: str,
        pretrained: bool = False,
        channel_multiplier: float = 1.,
        depth_multiplier: float = 1.,
        lite: bool = False,
        **kwargs: Any,
) -> ContextPoolEfficientNet:
    se = '' if lite else '_se0.25'
    stages = ('ds_r1_k3_s1_e1_c16', 'ir_r2_k3_s2_e6_c24', 'ir_r2_k5_s2_e6_c40', 'ir_r3_k3_s2_e6_c80',
              'ir_r3_k5_s1_e6_c112', 'ir_r4_k5_s2_e6_c192', 'ir_r1_k3_s1_e6_c320')
    round_chs_fn = partial(round_channels, multiplier=channel_multiplier)
    norm_layer = kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
    model_args = dict(
        # lite models scale neither the stem and the head nor the depth of the first and the last stage
        block_args=decode_arch_def([[f'{stage}{se}'] for stage in stages], depth_multiplier, fix_first_last=lite),
        num_features=1280 if lite else round_chs_fn(1280),
        stem_size=32,
        fix_stem=lite,
        round_chs_fn=round_chs_fn,
        act_layer=resolve_act_layer(kwargs, 'relu6' if lite else 'swish'),
        norm_layer=norm_layer,
    )
    return build_variant(
        ContextPoolEfficientNet,
        FAMILY,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls='getter'),
        **dict(model_args, **kwargs),
    )


_LITE_ARGS = dict(lite=True, bn_eps=BN_EPS_TF_DEFAULT, pad_type='same')

default_cfgs = variant_cfgs(bases={
    'efficientnet_b0_cpool': 'efficientnet_b0',
    **{f'tf_efficientnet_lite{n}_cpool': f'tf_efficientnet_lite{n}' for n in (0, 1, 2)},
}, own={})


@register_model
def efficientnet_b0_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolEfficientNet:
    """EfficientNet-B0 with context pooling."""
    return _create_efficientnet('efficientnet_b0_cpool', pretrained, **kwargs)


@register_model
def tf_efficientnet_lite0_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolEfficientNet:
    """EfficientNet-Lite0 with context pooling."""
    return _create_efficientnet('tf_efficientnet_lite0_cpool', pretrained, **dict(_LITE_ARGS, **kwargs))


@register_model
def tf_efficientnet_lite1_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolEfficientNet:
    """EfficientNet-Lite1 with context pooling."""
    model_args = dict(_LITE_ARGS, depth_multiplier=1.1)
    return _create_efficientnet('tf_efficientnet_lite1_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def tf_efficientnet_lite2_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolEfficientNet:
    """EfficientNet-Lite2 with context pooling."""
    model_args = dict(_LITE_ARGS, channel_multiplier=1.1, depth_multiplier=1.2)
    return _create_efficientnet('tf_efficientnet_lite2_cpool', pretrained, **dict(model_args, **kwargs))
