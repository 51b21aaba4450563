"""Swin transformers with context pooling.

Swin: `Swin Transformer: Hierarchical Vision Transformer using Shifted Windows`, https://arxiv.org/abs/2103.14030
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
from typing import Any

import torch.nn.functional as F
from timm.models import SwinTransformer
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from ..layers import Mixer2d, create_mixer
from ._builder import build_variant, check_placed, variant_cfgs
from ._compat import register_model, swin_filter_fn
from ._family import Family, PoolConfig

__all__ = ['ContextPoolSwinTransformer']

FAMILY = Family(
    'swin_transformer', positions=('pre_attn', 'window', 'post_block'), stages=(2, 3), ratio=0.25, groups=16)


class ContextPoolLinear(nn.Linear):
    """Queries, keys and values of pooled tokens `(windows, N, C)`: each window is its own map."""

    def __init__(self, *args: Any, cpool: Mixer2d, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cpool = cpool

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.cpool(x), self.weight, self.bias)


class ContextPoolSwinBlock(SwinTransformerBlock):
    """timm's block with a pool of the input of attention (`cpool_attn`) and of the output of the block (`cpool`).

    Both pool the whole map, before it is split into windows. Either may be None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cpool_attn: Mixer2d | None = None
        self.cpool: Mixer2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.cpool_attn is not None:
            y = self.cpool_attn(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self._attn(y))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        if self.cpool is not None:
            x = self.cpool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).type_as(x)
        return x


class ContextPoolSwinTransformer(SwinTransformer):
    """timm's `SwinTransformer` with context pools.

    Positions: `pre_attn` pools the whole map that a block's attention reads, so windows see across their borders;
    `window` pools inside each window; `post_block` pools the residual stream after every block of a stage except its
    last.

    Args:
        *args, **kwargs: As for `SwinTransformer`.
        cpool: Where and how to pool; the defaults of the family if None.
    """

    def __init__(self, *args: Any, cpool: PoolConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        pool_args = dict(cpool.layer_args, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        for i in cpool.stages if cpool.positions else ():
            stage: Any = self.layers[i]
            for j, block in enumerate(stage.blocks):
                # timm's stage builds its blocks itself: changing classes keeps weights and names.
                block.__class__ = ContextPoolSwinBlock
                pools_after = 'post_block' in cpool.positions and j + 1 < len(stage.blocks)
                block.cpool_attn = create_mixer(block.dim, **pool_args) if 'pre_attn' in cpool.positions else None
                block.cpool = create_mixer(block.dim, **pool_args) if pools_after else None
                if 'window' in cpool.positions:
                    block.attn.qkv.__class__ = ContextPoolLinear
                    block.attn.qkv.cpool = create_mixer(
                        block.dim, layout='tokens', grid_size=block.attn.window_size, **pool_args)
        check_placed(self, cpool)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As in timm's class; pools inside windows follow the windows' size."""
        super().set_input_size(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, WindowAttention) and isinstance(module.qkv, ContextPoolLinear):
                module.qkv.cpool.grid_size = module.window_size


def _create_swin_transformer(variant: str, pretrained: bool = False, **kwargs: Any) -> ContextPoolSwinTransformer:
    return build_variant(
        ContextPoolSwinTransformer,
        FAMILY,
        variant,
        pretrained,
        base_filter=swin_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


default_cfgs = variant_cfgs(
    bases={
        f'swin_{size}_cpool_patch4_window7_224': f'swin_{size}_patch4_window7_224'
        for size in ('tiny', 'small', 'base')},
    own={
        'swin_micro_cpool_patch2_window4_32.untrained': dict(
            num_classes=10, input_size=(3, 32, 32), pool_size=(2, 2), fixed_input_size=True, crop_pct=1.0,
            interpolation='bicubic', mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='patch_embed.proj',
            classifier='head.fc', license='apache-2.0'),
    },
)


@register_model
def swin_micro_cpool_patch2_window4_32(pretrained: bool = False, **kwargs: Any) -> ContextPoolSwinTransformer:
    """Swin of 1.1 M parameters for 32 x 32 images, with context pooling: the first stage has 16 x 16 tokens."""
    model_args = dict(
        img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 2, 4, 1), num_heads=(2, 3, 6, 12),
        cpool_groups=6)
    return _create_swin_transformer('swin_micro_cpool_patch2_window4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def swin_tiny_cpool_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolSwinTransformer:
    """Swin-T with context pooling."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_swin_transformer('swin_tiny_cpool_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def swin_small_cpool_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolSwinTransformer:
    """Swin-S with context pooling."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_swin_transformer('swin_small_cpool_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def swin_base_cpool_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolSwinTransformer:
    """Swin-B with context pooling."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_swin_transformer('swin_base_cpool_patch4_window7_224', pretrained, **dict(model_args, **kwargs))
