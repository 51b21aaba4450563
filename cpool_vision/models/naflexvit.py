"""NaFlex vision transformers with context pooling: images of any size and aspect ratio, each on its own grid.

NaFlex as in NaViT: `Patch n' Pack`, https://arxiv.org/abs/2307.06304, and FlexiViT, https://arxiv.org/abs/2212.08013
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
import dataclasses
import math
from typing import Any, NamedTuple

import torch
from timm.models import NaFlexVit, adapt_input_conv, register_notrace_function, register_notrace_module
from timm.models.naflexvit import NaFlexVitCfg
from torch import Tensor

from ..layers import NaFlexMixer, TokenGrids, create_mixer, find_grids
from ._builder import build_variant, check_placed, variant_cfgs
from ._compat import naflexvit_filter_fn, register_model
from ._family import Family, PoolConfig
from .vision_transformer import ContextPoolBlock

__all__ = ['ContextPoolNaFlexVit']

FAMILY = Family('naflexvit', positions=('pre_attn', 'post_block'), ratio=0.25, groups=16)

register_notrace_module(NaFlexMixer)


class GridMask(NamedTuple):
    """What blocks are called with as `attn_mask`: the mask itself, and the grids of the batch."""
    attn_mask: Tensor | None
    grids: TokenGrids


@torch.fx.wrap
@register_notrace_function
def grids_of_input(
        x: Tensor,
        patch_coord: Tensor | None,
        patch_valid: Tensor | None,
        patch_size: tuple[int, int],
        pad: bool,
        num_prefix_tokens: int,
) -> TokenGrids:
    """Grids of images `(B, C, H, W)`, padded to whole patches if `pad`, or of patches with their coordinates."""
    if patch_coord is not None:
        return find_grids(patch_coord, patch_valid, num_prefix_tokens)
    height, width = x.shape[-2] // patch_size[0], x.shape[-1] // patch_size[1]
    if pad:
        height, width = -(-x.shape[-2] // patch_size[0]), -(-x.shape[-1] // patch_size[1])
    return TokenGrids.of_images(x.shape[0], height, width)


class ContextPoolNaFlexBlock(ContextPoolBlock):
    """`ContextPoolBlock` whose pools work on the grids that come with the attention mask."""

    def forward(  # type: ignore[override]
            self,
            x: Tensor,
            attn_mask: Tensor | GridMask | None = None,
            is_causal: bool = False,
    ) -> Tensor:
        mask, grids = attn_mask if isinstance(attn_mask, GridMask) else (attn_mask, None)
        y = self.norm1(x)
        if self.cpool_attn is not None:
            y = self.cpool_attn(y, grids)
        x = self.add_branches(x, y, mask, is_causal)
        if self.cpool is not None:
            x = self.cpool(x, grids).type_as(x)
        return x


class ContextPoolNaFlexVit(NaFlexVit):
    """timm's `NaFlexVit` with context pools, for images and for batches of patches from a NaFlex loader.

    Positions `pre_attn` and `post_block` as in `ContextPoolVisionTransformer`. Each image is pooled on its own grid,
    from the image size or the coordinates of its patches; supports are relative to it. Padding and prefix tokens are
    not pooled.

    Args:
        cfg: As for `NaFlexVit`, without `block_fn`, and with timm's plain blocks.
        *args: More arguments of `NaFlexVit`.
        cpool: Where and how to pool; the defaults of the family if None.
        **kwargs: More arguments of `NaFlexVit`, fields of its configuration among them.

    Raises:
        ValueError: `block_fn` is given; or, with pools, the options ask for EVA's blocks (rotary embeddings, gates,
            SwiGLU), or `patch_drop_rate > 0`: dropped patches leave no grid.
    """

    def __init__(
            self,
            cfg: NaFlexVitCfg | None = None,
            *args: Any,
            cpool: PoolConfig | None = None,
            **kwargs: Any,
    ) -> None:
        fields = {field.name for field in dataclasses.fields(NaFlexVitCfg)}
        cfg = dataclasses.replace(cfg or NaFlexVitCfg(), **{k: kwargs.pop(k) for k in fields & set(kwargs)})
        if cfg.block_fn is not None:
            raise ValueError(f'block_fn must be left out, got {cfg.block_fn!r}: the blocks are ContextPoolNaFlexBlock')
        block_fn: Any = ContextPoolNaFlexBlock
        super().__init__(dataclasses.replace(cfg, block_fn=block_fn), *args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        positions = cpool.positions
        self.has_pools = bool(positions)
        if positions and cfg.patch_drop_rate > 0:
            raise ValueError(
                f'patch_drop_rate must be 0 with context pooling, got {cfg.patch_drop_rate}: '
                f'dropped patches leave no grid to pool on')
        pool_args = dict(
            cpool.layer_args,
            layout='naflex',
            num_prefix_tokens=self.num_prefix_tokens,
            device=kwargs.get('device'),
            dtype=kwargs.get('dtype'),
        )
        for i, block in enumerate(self.blocks if positions else ()):
            if not isinstance(block, ContextPoolNaFlexBlock):
                raise ValueError(
                    f'the options ask for {type(block).__name__}, which has no place for a pool: leave out rope_type, '
                    f'attn_type, attn_gated, swiglu_mlp, attn_only_layer_scale and num_kv_heads')
            if 'pre_attn' in positions:
                block.cpool_attn = create_mixer(self.embed_dim, **pool_args)
            if 'post_block' in positions and i + 1 < len(self.blocks):
                block.cpool = create_mixer(self.embed_dim, **pool_args)
        check_placed(self, cpool)

    def _forward_embeds(
            self,
            x: Tensor,
            patch_coord: Tensor | None,
            patch_valid: Tensor | None,
            attn_mask: Tensor | None,
    ) -> dict[str, Any]:
        embeds: dict[str, Any] = super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        if self.has_pools:
            grids = grids_of_input(
                x, patch_coord, patch_valid, self.embeds.patch_size, self.embeds.dynamic_img_pad,
                self.num_prefix_tokens)
            # timm hands the mask on to every block, under checkpointing too, and reads it nowhere else
            embeds['attn_mask'] = GridMask(embeds['attn_mask'], grids)
        return embeds


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ContextPoolNaFlexVit) -> dict[str, Any]:
    """timm's conversion; linear projections of RGB patches also fit other channels, as timm makes convolutions do."""
    state_dict = naflexvit_filter_fn(state_dict, model)
    weight, embeds = state_dict.get('embeds.proj.weight'), model.embeds
    if weight is None or weight.ndim != 2 or model.in_chans == 3 or weight.shape[1] != 3 * math.prod(embeds.patch_size):
        return state_dict
    if embeds.channels_last:
        images = weight.unflatten(1, (*embeds.patch_size, 3)).permute(0, 3, 1, 2)
        adapted = adapt_input_conv(model.in_chans, images).permute(0, 2, 3, 1)
    else:
        adapted = adapt_input_conv(model.in_chans, weight.unflatten(1, (3, *embeds.patch_size)))
    return {**state_dict, 'embeds.proj.weight': adapted.flatten(1)}


def _create_naflexvit(variant: str, pretrained: bool = False, **kwargs: Any) -> ContextPoolNaFlexVit:
    return build_variant(
        ContextPoolNaFlexVit,
        FAMILY,
        variant,
        pretrained,
        base_filter=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        dict(
            num_classes=1000, input_size=(3, 384, 384), crop_pct=1.0, interpolation='bicubic', mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5), first_conv='embeds.proj', classifier='head', license='apache-2.0'),
        **kwargs,
    )


default_cfgs = variant_cfgs(
    bases={
        f'naflexvit_base_cpool_patch16_{kind}': f'naflexvit_base_patch16_{kind}'
        for kind in ('gap', 'par_gap', 'parfac_gap')},
    own={
        'naflexvit_micro_cpool_patch4_gap.untrained': _cfg(num_classes=10, input_size=(3, 32, 32)),
        'naflexvit_small_cpool_patch16_gap.untrained': _cfg(),
    },
)

_BASE_ARGS: dict[str, Any] = dict(
    patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1e-5, reg_tokens=4, global_pool='avg',
    fc_norm=True)


@register_model
def naflexvit_micro_cpool_patch4_gap(pretrained: bool = False, **kwargs: Any) -> ContextPoolNaFlexVit:
    """NaFlex ViT of 1.2 M parameters for images of about 32 x 32 pixels: 8 x 8 tokens, mean-pooled."""
    model_args = dict(
        patch_size=4, embed_dim=128, depth=6, num_heads=4, pos_embed_grid_size=(8, 8), global_pool='avg', fc_norm=True,
        cpool_groups=8)
    return _create_naflexvit('naflexvit_micro_cpool_patch4_gap', pretrained, **dict(model_args, **kwargs))


@register_model
def naflexvit_small_cpool_patch16_gap(pretrained: bool = False, **kwargs: Any) -> ContextPoolNaFlexVit:
    """NaFlex ViT-S/16 with context pooling, four registers, mean-pooled."""
    model_args = dict(_BASE_ARGS, embed_dim=384, num_heads=6)
    return _create_naflexvit('naflexvit_small_cpool_patch16_gap', pretrained, **dict(model_args, **kwargs))


@register_model
def naflexvit_base_cpool_patch16_gap(pretrained: bool = False, **kwargs: Any) -> ContextPoolNaFlexVit:
    """NaFlex ViT-B/16 with context pooling, four registers, mean-pooled."""
    return _create_naflexvit('naflexvit_base_cpool_patch16_gap', pretrained, **dict(_BASE_ARGS, **kwargs))


@register_model
def naflexvit_base_cpool_patch16_par_gap(pretrained: bool = False, **kwargs: Any) -> ContextPoolNaFlexVit:
    """NaFlex ViT-B/16 with context pooling and position embeddings that keep the aspect ratio."""
    model_args = dict(_BASE_ARGS, pos_embed_ar_preserving=True)
    return _create_naflexvit('naflexvit_base_cpool_patch16_par_gap', pretrained, **dict(model_args, **kwargs))


@register_model
def naflexvit_base_cpool_patch16_parfac_gap(pretrained: bool = False, **kwargs: Any) -> ContextPoolNaFlexVit:
    """NaFlex ViT-B/16 with context pooling and factorized position embeddings that keep the aspect ratio."""
    model_args = dict(_BASE_ARGS, pos_embed='factorized', pos_embed_ar_preserving=True)
    return _create_naflexvit('naflexvit_base_cpool_patch16_parfac_gap', pretrained, **dict(model_args, **kwargs))
