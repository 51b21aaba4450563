"""The context pooling operator. Needs torch only."""
from .api import context_pool2d
from .backends import BACKENDS, available_backends
from .onnx import refuse_torchscript_export
from .plan import TOLERANCE
from .reference import context_pool2d_reference

refuse_torchscript_export()

__all__ = ['BACKENDS', 'TOLERANCE', 'available_backends', 'context_pool2d', 'context_pool2d_reference']
