"""The definition of context pooling, dense: the oracle every other implementation is judged against."""
import torch
from torch import Tensor


def squared_offsets(out_size: int, in_size: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Squared distances along one axis, in input pixels, from output cell centres to pixel centres.

    Twice the offset is an integer, so every distance is exact in fp32 for maps of up to 2,000 pixels a side.

    Returns:
        `(out_size, in_size)` of `dtype`.
    """
    centre = 2 * stride * torch.arange(out_size, device=device) + (stride - 1)
    offset = centre[:, None] - 2 * torch.arange(in_size, device=device)[None, :]
    return offset.square().to(dtype) / 4


def context_pool2d_reference(x: Tensor, weight_logits: Tensor, sigma: Tensor, stride: int = 1) -> Tensor:
    """Pools every output cell's neighbourhood with learned weights and a learned Gaussian support, densely.

    `y[b, c, i] = sum_j softmax_j(l_j - |p_i - p_j|^2 / (2 sigma_i^2)) x[b, c, j]` over all pixels j of the map
    (Huang et al., ICML 2022, https://arxiv.org/abs/2207.01844). Time and memory grow with `(H W)(Ho Wo)`.
    Differentiable by autograd to any order. Arguments and result are those of `context_pool2d`.
    """
    b, c, h, w = x.shape
    g, ho, wo = sigma.shape[1:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy = squared_offsets(ho, h, stride, dtype, x.device)
    dx = squared_offsets(wo, w, stride, dtype, x.device)
    dist = (dy[:, None, :, None] + dx[None, :, None, :]).view(ho * wo, h * w)
    logits = weight_logits.to(dtype).reshape(b, g, 1, h * w)
    attn = (logits - dist / (2 * sigma.to(dtype).square().reshape(b, g, ho * wo, 1))).softmax(-1)
    y = attn @ x.to(dtype).reshape(b, g, c // g, h * w).transpose(-2, -1)
    return y.transpose(-2, -1).reshape(b, c, ho, wo).to(x.dtype)
