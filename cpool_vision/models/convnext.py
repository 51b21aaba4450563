"""ConvNeXts with context pooling.

ConvNeXt: `A ConvNet for the 2020s`, https://arxiv.org/abs/2201.03545
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
from collections import OrderedDict
from typing import Any

import torch
from timm.models import ConvNeXt
from torch import nn

from ..layers import create_mixer
from ._builder import build_variant, check_placed, variant_cfgs
from ._compat import convnext_filter_fn, register_model
from ._family import Family, PoolConfig

__all__ = ['ContextPoolConvNeXt']

# At 224 pixels the first stage holds 56 x 56 maps, where a pool can cost more than the rest of its stage.
FAMILY = Family(
    'convnext', positions=('pre_block', 'downsample'), stages=(1, 2, 3), groups=16,
    former_positions={'stage': 'pre_block'})


class ContextPoolConvNeXt(ConvNeXt):
    """timm's `ConvNeXt` with context pools.

    Positions: `pre_block` pools the input of each stage's last block; `downsample` pools before the strided
    convolution between stages, after its norm. Both run at stride 1, so `init='identity'` starts from the base.

    Args:
        *args, **kwargs: As for `ConvNeXt`.
        cpool: Where and how to pool; the defaults of the family if None.
    """

    def __init__(self, *args: Any, cpool: PoolConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        positions = cpool.positions
        pool_args = dict(cpool.layer_args, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        for i in cpool.stages:
            stage: Any = self.stages[i]
            dim: Any = self.feature_info[i]['num_chs']
            if 'pre_block' in positions:
                pool = create_mixer(dim, **pool_args)
                *blocks, last = stage.blocks.named_children()
                stage.blocks = nn.Sequential(OrderedDict([*blocks, ('cpool', pool), last]))
            if 'downsample' in positions and isinstance(stage.downsample, nn.Sequential):
                norm, conv = stage.downsample.children()
                dim = conv.in_channels
                pool = create_mixer(dim, **pool_args)
                # The base's own names stay, so that its weights load.
                stage.downsample = nn.Sequential(OrderedDict([('0', norm), ('cpool', pool), ('1', conv)]))
        check_placed(self, cpool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As in timm's class; a stage's pool belongs to the group of the stage's last block."""
        matcher = super().group_matcher(coarse=coarse)
        if not coarse:
            stages: Any = self.stages
            matcher['blocks'] = [
                (rf'^stages\.({i})\.blocks\.cpool', (len(stage.blocks) - 2,))
                for i, stage in enumerate(stages) if hasattr(stage.blocks, 'cpool')
            ] + list(matcher['blocks'])
        return matcher


def _create_convnext(variant: str, pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    return build_variant(
        ContextPoolConvNeXt,
        FAMILY,
        variant,
        pretrained,
        base_filter=convnext_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


default_cfgs = variant_cfgs(
    bases={f'convnext_{size}_cpool': f'convnext_{size}' for size in ('atto', 'nano', 'tiny', 'small', 'base')},
    own={
        'convnext_micro_cpool_32.untrained': dict(
            num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, interpolation='bicubic',
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='stem.0', classifier='head.fc',
            license='apache-2.0'),
    },
)


@register_model
def convnext_micro_cpool_32(pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    """ConvNeXt of 1.1 M parameters for 32 x 32 images: the first stage runs at full resolution."""
    model_args = dict(
        depths=(2, 2, 4, 1), dims=(32, 64, 128, 192), patch_size=1, conv_mlp=True, ls_init_value=0.1)
    return _create_convnext('convnext_micro_cpool_32', pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_atto_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    """ConvNeXt-Atto with context pooling."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True, cpool_groups=8)
    return _create_convnext('convnext_atto_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_nano_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    """ConvNeXt-Nano with context pooling."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640), conv_mlp=True)
    return _create_convnext('convnext_nano_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_tiny_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    """ConvNeXt-T with context pooling."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    return _create_convnext('convnext_tiny_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_small_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    """ConvNeXt-S with context pooling."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
    return _create_convnext('convnext_small_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_base_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolConvNeXt:
    """ConvNeXt-B with context pooling."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
    return _create_convnext('convnext_base_cpool', pretrained, **dict(model_args, **kwargs))
