"""Rivals: other modules that adapt or blur, for comparison with a context pool in the same slot."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.reference import squared_offsets
from .context_pool import default_hidden_dim


class GaussianBlur2d(nn.Module):
    """A separable Gaussian of one constant width, normalized at the borders: `(B, C, H, W)` to `(B, C, Ho, Wo)`.

    It has no parameters. It equals a context pool with equal weights and constant supports, at the cost of two small
    matrix products.

    Args:
        stride: Output cells are `stride` pixels apart.
        ratio: Standard deviation relative to the side `sqrt(H * W)` of the map.
        floor: Number of pixels added to the standard deviation.
    """

    def __init__(self, stride: int = 1, ratio: float = 0.05, floor: float = 0.1) -> None:
        super().__init__()
        self.stride, self.ratio, self.floor = stride, ratio, floor

    def _weights(self, size: int, sigma: float, like: Tensor) -> Tensor:
        squares = squared_offsets(-(-size // self.stride), size, self.stride, torch.float32, like.device)
        return (-squares / (2 * sigma * sigma)).softmax(-1).to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        sigma = self.floor + self.ratio * math.sqrt(height * width)
        return self._weights(height, sigma, x) @ x @ self._weights(width, sigma, x).mT

    def extra_repr(self) -> str:
        return f'stride={self.stride}, ratio={self.ratio}, floor={self.floor}'


class DeformableDepthwise2d(nn.Module):
    """A depthwise 3x3 convolution with predicted offsets of its taps, one set per pixel.

    The predictor is as small as that of `ContextPool2d`. The layer starts as the identity. `Deformable
    Convolutional Networks`, https://arxiv.org/abs/1703.06211; the sampling is torchvision's.

    Args:
        dim: Channels C.
        stride: Output cells are `stride` pixels apart.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, stride: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = default_hidden_dim(dim)
        self.stride = stride
        self.reduce = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.predict = nn.Conv2d(hidden_dim, 18, 3, stride, 1, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets small predictor weights (std .02), zero biases, and a convolution that is the identity."""
        for conv in (self.reduce, self.predict, self.conv):
            nn.init.trunc_normal_(conv.weight, std=.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.dirac_(self.conv.weight, groups=self.conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d
        offset = self.predict(F.gelu(self.reduce(x)))
        return deform_conv2d(
            x.contiguous(), offset.type_as(x), self.conv.weight.type_as(x), self.conv.bias, self.stride, 1)


def dilated_with_learned_spacings(dim: int, stride: int = 1, device: Any = None, dtype: Any = None) -> nn.Module:
    """A depthwise convolution of nine Gaussian taps with learned positions in 7x7 pixels, the same for all images.

    `Dilated Convolution with Learnable Spacings`, https://arxiv.org/abs/2112.03740, from the package `dcls`.

    Raises:
        ModuleNotFoundError: `dcls` is not installed.
    """
    try:
        from DCLS.construct.modules import Dcls2d
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mixer 'dcls' needs the package dcls: pip install 'cpool_vision[study]'", name=error.name) from error
    module = Dcls2d(
        dim, dim, 9, stride=stride, padding=3, groups=dim, dilated_kernel_size=7, version='gauss')
    return module.to(device=device, dtype=dtype)


def blur_pool(stride: int = 1, device: Any = None, dtype: Any = None) -> nn.Module:
    """timm's `BlurPool2d`, a constant binomial 3x3 filter, for maps of any number of channels.

    `Making Convolutional Networks Shift-Invariant Again`, https://arxiv.org/abs/1904.11486.
    """
    from timm.layers import BlurPool2d
    return BlurPool2d(stride=stride, device=device, dtype=dtype)


def selective_kernel(dim: int, stride: int = 1, device: Any = None, dtype: Any = None) -> nn.Module:
    """timm's selective kernel: depthwise 3x3 and dilated 3x3 convolutions, weighted per image and channel.

    `Selective Kernel Networks`, https://arxiv.org/abs/1903.06586.
    """
    from timm.layers import SelectiveKernel
    return SelectiveKernel(
        dim, dim, stride=stride, groups=dim, split_input=False, rd_channels=default_hidden_dim(dim), device=device,
        dtype=dtype)
