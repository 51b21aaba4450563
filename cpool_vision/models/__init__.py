"""The families; importing this package registers every variant with timm."""
from .convnext import ContextPoolConvNeXt
from .metaformer import ContextPoolMetaFormer
from .naflexvit import ContextPoolNaFlexVit
from .resnet import ContextPoolResNet
from .swin_transformer import ContextPoolSwinTransformer
from .vision_transformer import ContextPoolVisionTransformer

__all__ = [
    'ContextPoolConvNeXt', 'ContextPoolMetaFormer', 'ContextPoolNaFlexVit', 'ContextPoolResNet',
    'ContextPoolSwinTransformer', 'ContextPoolVisionTransformer']
