"""The operator as users call it."""

import torch
from torch import Tensor

from . import layer, registry  # noqa: F401  register torch.ops.cpool_vision


def context_pool2d(
        x: Tensor,
        weight_logits: Tensor,
        sigma: Tensor,
        *,
        stride: int = 1,
        offset: Tensor | None = None,
        backend: str | None = None,
) -> Tensor:
    """Replaces every output cell by a weighted mean of the map, with given pooling weights and Gaussian supports.

    `y[b, c, i] = sum_j a_ij x[b, c, j]` with `a_ij = softmax_j(l_j - |p_i + o_i - p_j|^2 / (2 sigma_i^2))` over all
    pixels j of the map, `p_j` the pixel center, `p_i` the center of output cell i and `o_i` its `offset`, zero if None.
    ContextPool, Huang et al., ICML 2022, https://arxiv.org/abs/2207.01844.

    Each output is a convex combination of the input's pixels. `sigma -> 0` gives the identity (stride 1),
    `sigma -> inf` the weighted global mean; a constant added to the logits changes nothing.

    Under autocast, features are pooled in the autocast dtype with weight logits and supports in fp32, and gradients
    have the dtypes of the inputs. Distances are computed from integer pixel indices, and sums are fp32 (fp64 for fp64
    input), under autocast too. The triton, native and tiled backends may skip pixels that hold at most
    `cpool_vision.ops.TOLERANCE[x.dtype]` of a query's weight: 2^-20, or 2^-46 in fp64.

    Args:
        x: features `(B, C, H, W)`, floating point, with any strides; channels-last input gives channels-last output.
        weight_logits: logarithms of the pooling weights, `(B, G, H, W)`; each of G groups pools `C / G` channels.
            A pixel with logit -inf and finite features has exactly no weight, as if it were not there.
        sigma: support sizes, `(B, Gs, ceil(H / stride), ceil(W / stride))`: standard deviations in input pixels, > 0.
            Gs divides G, and group g uses the supports `g // (G // Gs)`.
            `weight_logits` and `sigma` may have another floating dtype than `x`; keep them in fp32.
        stride: output cells are `stride` pixels apart.
        offset: where each group looks relative to the cell's center, rows before columns, in input pixels:
            `(B or 1, G, 2, Ho or 1, Wo or 1)`. It may point outside the map.
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
    for name, tensor in (('x', x), ('weight_logits', weight_logits), ('sigma', sigma), ('offset', offset)):
        if not isinstance(tensor, Tensor) and (name != 'offset' or tensor is not None):
            raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if not isinstance(stride, int) or isinstance(stride, bool):
        raise TypeError(f'stride must be an int, got {stride!r}')
    # Shapes are checked by the operator itself. Reading values would break graphs under tracing and stall a GPU; models
    # make supports positive by construction.
    if not torch.compiler.is_compiling() and type(sigma) is Tensor and sigma.device.type == 'cpu' and sigma.numel():
        _check_positive(sigma)
    return torch.ops.cpool_vision.context_pool2d(x, weight_logits, sigma, stride, backend, offset)


def _check_positive(sigma: Tensor) -> None:
    if torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None:
        return
    smallest = float(sigma.detach().amin())
    if not smallest > 0:
        raise ValueError(f'sigma must be > 0, got min={smallest}; map it through softplus or sigmoid plus a floor')
