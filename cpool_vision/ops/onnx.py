"""What `torch.onnx.export(..., dynamo=False)` says of the operators: it takes a graph of TorchScript, which is refused.

With `dynamo=True` the operators decompose into ONNX's own.
"""
from typing import Any

from torch.onnx import register_custom_op_symbolic
from torch.onnx.errors import OnnxExporterError

_OLDEST_OPSET = 7


def _refuse(*_: Any, **__: Any) -> None:
    raise OnnxExporterError(
        'context pools are not exported from TorchScript graphs (dynamo=False): pass dynamo=True to torch.onnx.export, '
        "or --dynamo to timm's onnx_export.py")


def refuse_torchscript_export() -> None:
    """Makes that exporter name the remedy, instead of an unknown operator."""
    for name in ('context_pool2d', 'supports_and_logits', 'predict_maps', 'context_pool_layer', 'to_autocast'):
        register_custom_op_symbolic(f'cpool_vision::{name}', _refuse, _OLDEST_OPSET)
