"""MetaFormers whose only token mixer is context pooling.

MetaFormer and PoolFormer: `MetaFormer Is Actually What You Need for Vision`, https://arxiv.org/abs/2111.11418
PoolFormerV2: `MetaFormer Baselines for Vision`, https://arxiv.org/abs/2210.13452
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
from typing import Any

import torch
from timm.layers import GroupNorm1
from timm.models.metaformer import GroupNorm1NoBias, MetaFormer
from torch import Tensor, nn

from ..layers import Mixer2d, create_mixer
from ._builder import build_variant, check_placed, variant_cfgs
from ._compat import metaformer_filter_fn, register_model
from ._family import STAGES, Family, PoolConfig

__all__ = ['ContextPoolMetaFormer']

FAMILY = Family(
    'metaformer', positions=('token_mixer',), stages=STAGES, former_positions={'mixer': 'token_mixer'})


class ContextPoolMixer(nn.Module):
    """Token mixer `pool(x) - x`: like PoolFormer, it subtracts the input, which the residual connection adds again.

    Args:
        cpool: Pools maps `(B, C, H, W)` at stride 1.
    """

    def __init__(self, cpool: Mixer2d) -> None:
        super().__init__()
        self.cpool = cpool

    def forward(self, x: Tensor) -> Tensor:
        return self.cpool(x) - x


class ContextPoolMetaFormer(MetaFormer):
    """timm's `MetaFormer` with context pools in place of PoolFormer's average pools.

    Position: `token_mixer` replaces the token mixer of every block in the stages that pool. With `init='identity'` it
    starts as the average pool. `cpool_mixer` selects a control instead; `identity` does not mix.

    Args:
        *args, **kwargs: As for `MetaFormer`, without `token_mixers`.
        small_stem: The stem is a 3x3 convolution at stride 2, for small images.
        cpool: Where and how to pool; the defaults of the family if None.

    Raises:
        ValueError: `token_mixers` is given: the pools replace them.
    """

    def __init__(
            self,
            *args: Any,
            small_stem: bool = False,
            cpool: PoolConfig | None = None,
            **kwargs: Any,
    ) -> None:
        if 'token_mixers' in kwargs:
            raise ValueError(
                f"token_mixers must be left out, got {kwargs['token_mixers']!r}: context pools take their place; "
                f"choose with cpool_positions and cpool_mixer")
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        dd: dict[str, Any] = dict(device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        if small_stem:
            conv: Any = self.stem.conv
            self.stem.conv = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=2, padding=1, **dd)
            self._init_weights(self.stem.conv)
            for i, info in enumerate(self.feature_info):
                info['reduction'] = 2 ** (i + 1)
        for i in cpool.stages if 'token_mixer' in cpool.positions else ():
            dim: Any = self.feature_info[i]['num_chs']
            stage: Any = self.stages[i]
            for block in stage.blocks:
                average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
                block.token_mixer = ContextPoolMixer(create_mixer(dim, base=average, **cpool.layer_args, **dd))
        check_placed(self, cpool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters of the stem and of every block, or of every stage if `coarse`."""
        blocks: Any = r'^stages\.(\d+)' if coarse else [
            (r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^stem', blocks=blocks)


def _create_metaformer(variant: str, pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    return build_variant(
        ContextPoolMetaFormer,
        FAMILY,
        variant,
        pretrained,
        base_filter=metaformer_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


default_cfgs = variant_cfgs(
    bases={f'{name}_cpool': name for name in (
        'poolformer_s12', 'poolformer_s24', 'poolformer_s36', 'poolformerv2_s12', 'poolformerv2_s24')},
    own={
        'poolformer_micro_cpool_32.untrained': dict(
            num_classes=10, input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, interpolation='bicubic',
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='stem.conv', classifier='head.fc',
            license='apache-2.0'),
    },
)

_V1_ARGS = dict(
    dims=(64, 128, 320, 512), downsample_norm=None, mlp_act=nn.GELU, mlp_bias=True, norm_layers=GroupNorm1,
    layer_scale_init_values=1e-5, res_scale_init_values=None, use_mlp_head=False)
_V2_ARGS = dict(dims=(64, 128, 320, 512), norm_layers=GroupNorm1NoBias, use_mlp_head=False)


@register_model
def poolformer_micro_cpool_32(pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    """PoolFormer of 0.9 M parameters for 32 x 32 images, with context pooling: the first stage has 16 x 16 maps."""
    model_args = dict(
        _V1_ARGS, depths=(2, 2, 4, 2), dims=(32, 64, 96, 128), small_stem=True, layer_scale_init_values=.1)
    return _create_metaformer('poolformer_micro_cpool_32', pretrained, **dict(model_args, **kwargs))


@register_model
def poolformer_s12_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    """PoolFormer-S12 with context pooling."""
    return _create_metaformer('poolformer_s12_cpool', pretrained, **dict(_V1_ARGS, depths=(2, 2, 6, 2), **kwargs))


@register_model
def poolformer_s24_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    """PoolFormer-S24 with context pooling."""
    return _create_metaformer('poolformer_s24_cpool', pretrained, **dict(_V1_ARGS, depths=(4, 4, 12, 4), **kwargs))


@register_model
def poolformer_s36_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    """PoolFormer-S36 with context pooling."""
    model_args = dict(_V1_ARGS, depths=(6, 6, 18, 6), layer_scale_init_values=1e-6)
    return _create_metaformer('poolformer_s36_cpool', pretrained, **dict(model_args, **kwargs))


@register_model
def poolformerv2_s12_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    """PoolFormerV2-S12 with context pooling."""
    return _create_metaformer('poolformerv2_s12_cpool', pretrained, **dict(_V2_ARGS, depths=(2, 2, 6, 2), **kwargs))


@register_model
def poolformerv2_s24_cpool(pretrained: bool = False, **kwargs: Any) -> ContextPoolMetaFormer:
    """PoolFormerV2-S24 with context pooling."""
    return _create_metaformer('poolformerv2_s24_cpool', pretrained, **dict(_V2_ARGS, depths=(4, 4, 12, 4), **kwargs))
