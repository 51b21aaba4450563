"""The private names of timm that this package uses, in one place."""
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_builder import (
    BN_EPS_TF_DEFAULT,
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
    round_channels,
)
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models.convnext import checkpoint_filter_fn as convnext_filter_fn
from timm.models.metaformer import checkpoint_filter_fn as metaformer_filter_fn
from timm.models.naflexvit import checkpoint_filter_fn as naflexvit_filter_fn
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter_fn
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn

__all__ = [
    'BN_EPS_TF_DEFAULT',
    'PretrainedCfg',
    'build_model_with_cfg',
    'checkpoint',
    'convnext_filter_fn',
    'decode_arch_def',
    'feature_take_indices',
    'generate_default_cfgs',
    'get_arch_pretrained_cfgs',
    'metaformer_filter_fn',
    'naflexvit_filter_fn',
    'register_model',
    'resolve_act_layer',
    'resolve_bn_args',
    'round_channels',
    'swin_filter_fn',
    'vit_filter_fn',
]
