"""The operator as users call it: arguments are checked here, and nothing is computed."""

import torch
from torch import Tensor

from . import registry  # noqa: F401  registers torch.ops.cpool_vision


def context_pool2d(
        x: Tensor,
        weight_logits: Tensor,
        sigma: Tensor,
        *,
        stride: int = 1,
        backend: str | None = None,
) -> Tensor:
    """Pools every output cell's neighbourhood with learned pooling weights and a learned Gaussian support.

    `y[b, c, i] = sum_j a_ij x[b, c, j]` with `a_ij = softmax_j(l_j - |p_i - p_j|^2 / (2 sigma_i^2))` over all pixels j
    of the map, `p_j` the pixel centre and `p_i` the centre of output cell i. ContextPool, Huang et al., ICML 2022,
    https://arxiv.org/abs/2207.01844.

    Each output is a convex combination of the input's pixels. `sigma -> 0` gives the identity (stride 1),
    `sigma -> inf` the weighted global mean; a constant added to the logits changes nothing.

    Under autocast features are pooled in the autocast dtype, weight logits and supports in fp32, and gradients come in
    the dtypes of the inputs. Distances come from integer pixel indices and sums are kept in fp32 (fp64 for fp64 input),
    under autocast too. The triton, native and tiled backends may leave out a share of each query's weight, at most
    `cpool_vision.ops.TOLERANCE[x.dtype]`: 2^-20, or 2^-46 in fp64.

    Args:
        x: features `(B, C, H, W)`, floating point, of any strides; channels-last input gives channels-last output.
        weight_logits: logarithms of the pooling weights, `(B, G, H, W)`; each of G groups pools `C / G` channels.
            A pixel of logit -inf, whose features are finite, weighs exactly nothing, as if it were not there.
        sigma: support sizes, `(B, G, ceil(H / stride), ceil(W / stride))`: standard deviations in input pixels, > 0.
            `weight_logits` and `sigma` may be of another floating dtype than `x`, and better stay in fp32.
        stride: output cells are `stride` pixels apart.
        backend: `'triton'`, `'native'`, `'tiled'`, `'reference'`, or None for the best that can run (see
            `available_backends`).

    Returns:
        `(B, C, ceil(H / stride), ceil(W / stride))` in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or `stride` is not an int.
        ValueError: wrong rank or shape, groups that do not divide the channels, `stride < 1`, tensors on several
            devices, supports that are not positive, or an unknown backend.
        NotImplementedError: the requested backend cannot take these arguments.
    """
    _check(x, weight_logits, sigma, stride)
    return torch.ops.cpool_vision.context_pool2d(x, weight_logits, sigma, stride, backend)


def _check(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int) -> None:
    for name, tensor in (('x', x), ('weight_logits', weight_logits), ('sigma', sigma)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
        if not tensor.is_floating_point():
            raise TypeError(f'{name} must be floating point, got {tensor.dtype}; convert it, e.g. {name}.float()')
        if tensor.ndim != 4:
            raise ValueError(f'{name} must have 4 dimensions (B, C or G, H, W), got shape {tuple(tensor.shape)}')
        if tensor.device != x.device:
            raise ValueError(f'{name} is on {tensor.device} but x on {x.device}; move them to one device')
    if not isinstance(stride, int) or isinstance(stride, bool):
        raise TypeError(f'stride must be an int, got {stride!r}')
    if stride < 1:
        raise ValueError(f'stride must be >= 1, got {stride=}')
    b, c, h, w = x.shape
    groups = weight_logits.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f'the {groups} groups of weight_logits must divide the {c} channels of x')
    if not h or not w:
        raise ValueError(f'x must have pixels, got shape {tuple(x.shape)}')
    for name, tensor, expected in (
            ('weight_logits', weight_logits, (b, groups, h, w)),
            ('sigma', sigma, (b, groups, -(-h // stride), -(-w // stride))),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f'{name} must have shape {expected} for x of shape {tuple(x.shape)} with {groups} groups and '
                f'{stride=}, got {tuple(tensor.shape)}')
    # Reading values would break graphs under tracing and stall a GPU; models make supports positive by construction.
    if not torch.compiler.is_compiling() and type(sigma) is Tensor and sigma.device.type == 'cpu' and sigma.numel():
        smallest = float(sigma.detach().amin())
        if not smallest > 0:
            raise ValueError(f'sigma must be > 0, got min={smallest}; map it through softplus or sigmoid plus a floor')
