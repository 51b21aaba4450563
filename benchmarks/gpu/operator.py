"""The operator against what else could stand in its place, and against the bytes that it must move."""
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpool_vision.ops import context_pool2d_reference
from cpool_vision.profile.cases import Case, Inputs
from cpool_vision.profile.floor import copy_bandwidth, moved_bytes
from cpool_vision.profile.implementations import Function, implementations, refusals
from cpool_vision.profile.measure import peak_memory

from .timing import call_ms, graph_ms, kernels_ms

# The images whose values are compared with fp64, all pairs at once.
_CHECKED = 2


def _case(
        b: int, c: int, h: int, w: int, groups: int, sigma: float, dtype: str = 'bfloat16', last: bool = True) -> Case:
    return Case((b, c, h, w), (0.1, sigma), groups, dtype=dtype, channels_last=last, backward=True)


# By name, the most important first; channels-last maps lie in memory as tokens do.
CASES = {
    'ViT-B 14x14, 16 groups': _case(128, 768, 14, 14, 16, 3.5),
    'ViT-S 14x14, 16 groups': _case(256, 384, 14, 14, 16, 3.5),
    '28x28, 192 channels, 16 groups': _case(128, 192, 28, 28, 16, 2.8),
    '56x56, 96 channels, supports to 2': _case(64, 96, 56, 56, 1, 2.0),
    '56x56, 96 channels, supports to 5.6': _case(64, 96, 56, 56, 1, 5.6),
    'ViT-B 24x24, 16 groups': _case(64, 768, 24, 24, 16, 6.0),
    'ViT-B 14x14, 1 group': _case(128, 768, 14, 14, 1, 3.5),
    'ResNet-50 14x14, 1 group': _case(128, 1024, 14, 14, 1, 1.4),
    'ConvNeXt-T 14x14, 16 groups': _case(128, 384, 14, 14, 16, 1.4),
    '56x56, 96 channels, NCHW': _case(64, 96, 56, 56, 1, 2.0, last=False),
    'ViT-B 14x14, 16 groups, fp32': _case(64, 768, 14, 14, 16, 3.5, 'float32'),
    '112x112, 64 channels': _case(32, 64, 112, 112, 1, 2.0),
}
# Of forward and backward on an H200, bf16, kernel time in ms.
AIMS = dict(zip(CASES, (0.25, 0.35, 1.2, 0.6, 1.5, 0.9, 0.15, 0.2), strict=False))
TINY_CASES = {'tiny': Case((2, 16, 6, 5), (0.1, 1.0), 2, channels_last=True, backward=True)}
FIRST = ('triton', 'depthwise_7x7')
OTHERS = ('reference', 'sdpa_augmented', 'depthwise_7x7_other_layout', 'flex_attention', 'deform_conv2d_3x3')


def _flex_attention(compiled: bool) -> Function:
    """The same weights as FlexAttention, which forms them inside its kernels from positions."""
    from torch.nn.attention.flex_attention import flex_attention
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def pool(x: Tensor, logits: Tensor, sigma: Tensor) -> Tensor:
        b, c, h, w = x.shape
        groups = logits.shape[1]
        value = x.reshape(b, groups, c // groups, h * w).transpose(2, 3)
        zeros = x.new_zeros(1, 1, 1, 16).expand(b, groups, h * w, 16)
        scale, key_logits = 0.5 / sigma.flatten(2).square(), logits.flatten(2)

        def score(_: Tensor, image: Tensor, group: Tensor, i: Tensor, j: Tensor) -> Tensor:
            rows, cols = i // w - j // w, i % w - j % w
            return key_logits[image, group, j] - (rows * rows + cols * cols) * scale[image, group, i]

        return attend(zeros, zeros, value, score_mod=score).transpose(2, 3).reshape(b, c, h, w)
    return pool


def _deformed(case: Case) -> Function:
    """A depthwise 3x3 convolution whose taps move by the supports, so that offsets have a gradient too."""
    from torchvision.ops import deform_conv2d
    channels = case.shape[1]
    kernel = torch.randn(channels, 1, 3, 3, device=case.device, dtype=torch.float32).requires_grad_()

    def pool(x: Tensor, logits: Tensor, sigma: Tensor) -> Tensor:
        offsets = sigma[:, :1].expand(-1, 18, -1, -1) * logits[:, :1]
        return deform_conv2d(x.float(), offsets.float(), kernel, padding=1).to(x.dtype)
    return pool


def functions(case: Case) -> dict[str, Callable[[], Function]]:
    """What is compared, made when its turn comes: functions of features, logits and supports."""
    def other_layout() -> Function:
        convolve = implementations(case)['depthwise_7x7']
        layout = torch.contiguous_format if case.channels_last else torch.channels_last
        return lambda x, logits, sigma: convolve(x.contiguous(memory_format=layout), logits, sigma)

    known = {name: (lambda name=name: implementations(case)[name])
             for name in ('triton', 'depthwise_7x7', 'reference', 'sdpa_augmented')}
    return known | {
        'depthwise_7x7_other_layout': other_layout,
        'flex_attention': lambda: _flex_attention(case.device != 'cpu'),
        'deform_conv2d_3x3': lambda: _deformed(case),
    }


def _errors(function: Function, inputs: Inputs, grad: Tensor) -> dict[str, float]:
    """Relative error, by Frobenius norm, of the output and of every gradient against fp64."""
    def results(run: Function, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [t[:_CHECKED].detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        y = run(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad[:_CHECKED].to(y.dtype))]

    exact = results(context_pool2d_reference, torch.float64)
    got = results(function, None)
    return {name: float((a.double() - b).norm() / b.norm())
            for name, a, b in zip(('y', 'dx', 'dlogits', 'dsigma'), got, exact, strict=True)}


@dataclasses.dataclass
class Prepared:
    """Inputs of a case, kept for all that is compared on them."""
    case: Case
    inputs: Inputs
    grad: Tensor
    floor_ms: float

    @classmethod
    def make(cls, case: Case) -> 'Prepared':
        inputs, grad = case.inputs()
        size = moved_bytes(case, inputs)
        return cls(case, inputs, grad, size / copy_bandwidth(case.device, size) * 1e3)


def measure(prepared: Prepared, name: str, repeats: int) -> dict[str, Any]:
    """One implementation on one case: times in ms, errors, memory; or in `refused`, why it cannot run."""
    case, inputs, grad = prepared.case, prepared.inputs, prepared.grad
    row: dict[str, Any] = {'implementation': name, 'floor_ms': prepared.floor_ms}
    reason = refusals(case, inputs).get(name)
    if reason:
        return row | {'refused': reason}
    function = functions(case)[name]()
    leaves = [t.detach().requires_grad_() for t in inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        # What does not depend on an input has no gradient for it.
        torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)

    row.update(forward_ms=call_ms(forward, case.device, repeats), both_ms=call_ms(both, case.device, repeats))
    row['kernels_ms'] = kernels_ms(both, case.device)
    row['kernel_ms'] = sum(row['kernels_ms'].values())
    row['kernels_ms'] = dict(list(row['kernels_ms'].items())[:8])
    row['peak_memory_per_x'] = peak_memory(function, inputs, grad)
    if name in ('triton', 'reference', 'sdpa_augmented', 'flex_attention'):
        row['errors'] = _errors(function, inputs, grad)
    if case.device != 'cpu':
        row['graph_ms'] = graph_ms(both, case.device, repeats)
    return row

