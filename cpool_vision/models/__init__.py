"""The families; importing this package registers every variant with timm."""
from .convnext import ContextPoolConvNeXt
from .resnet import ContextPoolResNet
from .vision_transformer import ContextPoolVisionTransformer

__all__ = ['ContextPoolConvNeXt', 'ContextPoolResNet', 'ContextPoolVisionTransformer']
