"""Nets of a stacked study: models of the zoo, with a linear head per pixel where the task is dense, and their stacks.

A stack is one net per seed with parameters of one more dimension. Its forward is that of the zoo's own modules under
`torch.func.vmap`, which turns a product per seed into a batched product.
"""
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

import cpool_vision  # noqa: F401  registers the variants
from cpool_vision.models.metaformer import ContextPoolMixer

from ..spec import Arm
from .tasks import Recipe


class DenseHead(nn.Module):
    """A linear layer from every token to the classes of its pixels."""

    def __init__(self, dim: int, patch: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes * patch ** 2)
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        maps = self.linear(tokens).transpose(1, 2).unflatten(2, (height, width))
        return self.shuffle(maps)


class DenseViT(nn.Module):
    """A ViT of the zoo without prefix tokens, and the classes of every pixel: `(B, 3, H, W)` to `(B, K, H, W)`."""

    def __init__(self, body: Any, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = DenseHead(body.embed_dim, body.patch_embed.patch_size[0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body.forward_features(images), *self.body.patch_embed.grid_size)


class MapAttention(nn.Module):
    """Self-attention over the places of a map `(B, C, H, W)`, in heads of 32 channels: a MetaFormer's token mixer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads=max(1, dim // 32), qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def _build(arm: Arm, recipe: Recipe, kwargs: dict[str, Any]) -> nn.Module:
    """The net of an arm. `cpool_mixer: attention`, of the study alone, puts attention in the place of a token mixer."""
    if kwargs.get('cpool_mixer') == 'attention':
        net = _build(arm, recipe, dict(kwargs, cpool_mixer='identity'))
        for module in net.modules():
            if isinstance(getattr(module, 'token_mixer', None), ContextPoolMixer):
                module.token_mixer = MapAttention(module.token_mixer.cpool.dim)  # type: ignore[union-attr,arg-type]
        return net
    if not recipe.dense:
        return timm.create_model(arm.model, num_classes=recipe.num_classes, **kwargs)
    body = timm.create_model(arm.model, num_classes=0, img_size=recipe.image_size, global_pool='', **kwargs)
    return DenseViT(body, recipe.num_classes)


def build_net(arm: Arm, recipe: Recipe, seed: int) -> nn.Module:
    """The net of a run. What an arm shares with the plain net of the same shape starts from the same weights."""
    plain = {k: v for k, v in arm.model_kwargs.items() if not k.startswith('cpool_')}
    torch.manual_seed(seed)
    shared = _build(arm, recipe, dict(plain, cpool_positions=[])).state_dict()
    torch.manual_seed(seed)
    net = _build(arm, recipe, arm.model_kwargs)
    for module in net.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False  # type: ignore[assignment]  # the fused product has no rule for stacks on a CPU
    own = net.state_dict()
    net.load_state_dict({
        k: shared[k] if k in shared and shared[k].shape == v.shape else v for k, v in own.items()})
    return net


def stack_parameters(nets: Sequence[nn.Module], device: torch.device) -> dict[str, Tensor]:
    """Parameters of like nets by name, `(S, ...)` leaves that require gradients.

    Raises:
        ValueError: several nets have running statistics, which stacks do not keep apart.
    """
    for name, buffer in nets[0].named_buffers():
        if 'running' in name and len(nets) > 1:
            raise ValueError(f'nets with running statistics train one at a time (--stack 1), got {name!r} of shape '
                             f'{tuple(buffer.shape)} in {len(nets)} nets')
    return {
        name: torch.stack([dict(net.named_parameters())[name].detach() for net in nets]).to(device).requires_grad_()
        for name, _ in nets[0].named_parameters()}


def unstack(net: nn.Module, parameters: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """State dict of net `i` of a stack: its parameters, and the buffers of `net`, which all share."""
    own = {name: value[i] for name, value in parameters.items()}
    return {name: own.get(name, value).detach().cpu().clone() for name, value in net.state_dict().items()}


def run_stack(net: nn.Module, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """Outputs `(S, B, ...)` of a stack for images `(S, B, 3, H, W)`, or `(B, 3, H, W)` shown to every net."""
    if len(next(iter(parameters.values()))) == 1:  # vmap costs a CPU more than it saves
        single = {name: value[0] for name, value in parameters.items()}
        return torch.func.functional_call(net, single, (images[0] if images.ndim == 5 else images,))[None]

    def call(single: dict[str, Tensor], batch: Tensor) -> Tensor:
        return torch.func.functional_call(net, single, (batch,))
    return torch.func.vmap(call, (0, 0 if images.ndim == 5 else None), randomness='different')(parameters, images)
