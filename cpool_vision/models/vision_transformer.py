"""Vision transformers with context pooling.

Plain ViT: `An Image is Worth 16x16 Words`, https://arxiv.org/abs/2010.11929
Context pooling: `Efficient Representation Learning via Adaptive Context Pooling`, https://arxiv.org/abs/2207.01844
"""
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..layers import Mixer2d, create_mixer, mixers
from ._builder import build_variant, check_placed, variant_cfgs
from ._compat import checkpoint, feature_take_indices, register_model, vit_filter_fn
from ._family import Family, PoolConfig

__all__ = ['ContextPoolVisionTransformer']

FAMILY = Family(  # the ratio at which docs/evidence_details.md measures position and groups
    'vision_transformer', positions=('pre_attn', 'pre_kv', 'post_block'), ratio=0.25, groups=16)


class ContextPoolBlock(Block):
    """timm's `Block` with a pool of the input of attention (`cpool_attn`) and of the output of the block (`cpool`).

    Both are None until the model sets them. `height` and `width` are the token grid of the call; without them the
    pools use their own `grid_size`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cpool_attn: Mixer2d | None = None
        self.cpool: Mixer2d | None = None

    def add_branches(self, x: Tensor, read: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The residual stream `x` plus attention over the tokens `read`, plus the MLP."""
        x = x + self.drop_path1(self.ls1(self.attn(read, attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            height: int | None = None,
            width: int | None = None,
    ) -> Tensor:
        y = self.norm1(x)
        if self.cpool_attn is not None:
            y = self.cpool_attn(y, height, width)
        x = self.add_branches(x, y, attn_mask, is_causal)
        if self.cpool is not None:
            x = self.cpool(x, height, width).type_as(x)  # the stream stays in fp32 under autocast
        return x


class ContextPoolKeyValue(nn.Linear):
    """Queries of the tokens `(B, P + N, C)`, keys and values of the pooled tokens: `(B, P + N, 3 C)`."""

    if TYPE_CHECKING:  # TorchScript reads annotations
        cpool: Mixer2d

    def forward(self, x: Tensor) -> Tensor:
        split, bias = self.out_features // 3, self.bias
        queries = F.linear(x, self.weight[:split], None if bias is None else bias[:split])
        rest = F.linear(self.cpool(x), self.weight[split:], None if bias is None else bias[split:])
        return torch.cat([queries, rest], dim=-1)


class ContextPoolVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with context pools.

    Positions: `pre_attn` pools the input of each block's attention, after its first norm; `pre_kv` pools the input of
    keys and values only, not of queries; `post_block` pools the residual stream between blocks, as in the paper.
    Prefix tokens are not pooled.

    Args:
        *args, **kwargs: As for `VisionTransformer`, without `block_fn`.
        cpool: Where and how to pool; the defaults of the family if None.

    Raises:
        ValueError: `block_fn` is given, `patch_drop_rate > 0` with pools (dropped patches leave no grid), or
            `dynamic_img_size` with `pre_kv`, whose pools know the grid of `img_size` only.
    """

    def __init__(self, *args: Any, cpool: PoolConfig | None = None, **kwargs: Any) -> None:
        if 'block_fn' in kwargs:
            raise ValueError(f"block_fn must be left out, got {kwargs['block_fn']!r}: the blocks are ContextPoolBlock")
        kwargs['block_fn'] = ContextPoolBlock
        super().__init__(*args, **kwargs)
        cpool = cpool or PoolConfig(FAMILY)
        positions = cpool.positions
        if positions and kwargs.get('patch_drop_rate', 0.) > 0:
            raise ValueError(
                f"patch_drop_rate must be 0 with context pooling, got {kwargs['patch_drop_rate']}: "
                f'dropped patches leave no grid to pool on')
        if 'pre_kv' in positions and self.dynamic_img_size:
            raise ValueError("position 'pre_kv' needs images of one size: leave out dynamic_img_size=True and call "
                             "set_input_size for another size, or take 'pre_attn'")
        pool_args = dict(
            cpool.layer_args,
            num_prefix_tokens=self.num_prefix_tokens,
            grid_size=self.patch_embed.grid_size,
            device=kwargs.get('device'),
            dtype=kwargs.get('dtype'),
        )
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            if 'pre_attn' in positions:
                block.cpool_attn = create_mixer(self.embed_dim, layout='tokens', **pool_args)
            if 'pre_kv' in positions:
                # timm's attention builds its projection itself: changing the class keeps weights and names.
                qkv = block.attn.qkv
                qkv.__class__ = ContextPoolKeyValue
                qkv.cpool = create_mixer(self.embed_dim, layout='tokens', **pool_args)
            if 'post_block' in positions and i + 1 < len(blocks):
                block.cpool = create_mixer(self.embed_dim, layout='tokens', **pool_args)
        check_placed(self, cpool)

    def set_input_size(
            self,
            img_size: tuple[int, int] | None = None,
            patch_size: tuple[int, int] | None = None,
    ) -> None:
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for _, pool in mixers(self):
            pool.grid_size = self.patch_embed.grid_size

    def token_grid(self, x: Tensor) -> tuple[int, int]:
        """Height and width in tokens of the embedded images `x` (before the positions are added)."""
        if self.dynamic_img_size:
            return x.shape[1], x.shape[2]
        return self.patch_embed.grid_size

    def _embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.patch_embed(x)
        height, width = self.token_grid(x)
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        return x, height, width

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, height, width = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, attn_mask, is_causal, height, width)
            else:
                x = block(x, attn_mask, is_causal, height, width)
        return self.norm(x)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
    ) -> Any:
        """Block outputs at `indices`, beside the final tokens; arguments and results as in timm's class."""
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt must be NCHW or NLC, got {output_fmt!r}')
        take, last = feature_take_indices(len(self.blocks), indices)
        x, height, width = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[:last + 1] if stop_early else self.blocks):
            if self.grad_checkpointing:
                x = checkpoint(block, x, attn_mask, is_causal, height, width)
            else:
                x = block(x, attn_mask, is_causal, height, width)
            if i in take:
                taken.append(self.norm(x) if norm else x)

        prefixes = [y[:, :self.num_prefix_tokens] for y in taken]
        grids = [y[:, self.num_prefix_tokens:] for y in taken]
        if output_fmt == 'NCHW':
            grids = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in grids]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            out: dict[str, Any] = {'image_intermediates': grids}
            if with_prefix:
                out['image_intermediates_prefix'] = prefixes
            if not intermediates_only:
                out['image_features'] = self.norm(x)
            return out
        results: list[Any] = list(zip(grids, prefixes, strict=True)) if with_prefix else grids
        return results if intermediates_only else (self.norm(x), results)


def _create_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    return build_variant(
        ContextPoolVisionTransformer,
        FAMILY,
        variant,
        pretrained,
        base_filter=vit_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


def _depth_cfg() -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True, crop_pct=.9, interpolation='bicubic',
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='patch_embed.proj', classifier='head',
        license='apache-2.0')


default_cfgs = variant_cfgs(
    bases={
        'vit_tiny_cpool_patch16_224': 'vit_tiny_patch16_224',
        'vit_small_cpool_patch16_224': 'vit_small_patch16_224',
        'vit_base_cpool_patch16_224': 'vit_base_patch16_224',
    },
    own={
        'vit_micro_cpool_patch4_32.untrained': dict(
            num_classes=10, input_size=(3, 32, 32), fixed_input_size=True, crop_pct=1.0, interpolation='bicubic',
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='patch_embed.proj', classifier='head',
            license='apache-2.0'),
        **{f'vit_{size}_cpool_d{depth}_patch16_224.untrained': _depth_cfg()
           for size in ('small', 'base') for depth in (6, 8, 9, 10)},
    },
)


@register_model
def vit_micro_cpool_patch4_32(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT of 1.2 M parameters for 32 x 32 images: 8 x 8 tokens, mean-pooled, no class token."""
    model_args = dict(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, class_token=False, global_pool='avg',
        cpool_groups=8)
    return _create_vit('vit_micro_cpool_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_tiny_cpool_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-Ti/16 with context pooling."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_vit('vit_tiny_cpool_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_cpool_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-S/16 with context pooling."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_vit('vit_small_cpool_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_cpool_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-B/16 with context pooling."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create_vit('vit_base_cpool_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_cpool_d6_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-S/16 with context pooling and six layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=384, depth=6, num_heads=6)
    return _create_vit('vit_small_cpool_d6_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_cpool_d8_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-S/16 with context pooling and eight layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=384, depth=8, num_heads=6)
    return _create_vit('vit_small_cpool_d8_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_cpool_d9_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-S/16 with context pooling and nine layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=384, depth=9, num_heads=6)
    return _create_vit('vit_small_cpool_d9_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_cpool_d10_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-S/16 with context pooling and ten layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=384, depth=10, num_heads=6)
    return _create_vit('vit_small_cpool_d10_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_cpool_d6_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-B/16 with context pooling and six layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=768, depth=6, num_heads=12)
    return _create_vit('vit_base_cpool_d6_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_cpool_d8_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-B/16 with context pooling and eight layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=768, depth=8, num_heads=12)
    return _create_vit('vit_base_cpool_d8_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_cpool_d9_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-B/16 with context pooling and nine layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=768, depth=9, num_heads=12)
    return _create_vit('vit_base_cpool_d9_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_cpool_d10_patch16_224(pretrained: bool = False, **kwargs: Any) -> ContextPoolVisionTransformer:
    """ViT-B/16 with context pooling and ten layers instead of twelve."""
    model_args = dict(patch_size=16, embed_dim=768, depth=10, num_heads=12)
    return _create_vit('vit_base_cpool_d10_patch16_224', pretrained, **dict(model_args, **kwargs))
