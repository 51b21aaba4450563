"""Cases to profile: shapes, supports, dtype and device of a call of the operator, and random inputs for it."""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cpool_vision.errors import ConfigError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float64': torch.float64}
# Smooth maps are interpolated from one random value per so many output cells along each axis.
SMOOTH_STEP = 7

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the operator.

    Args:
        shape: Shape of the features, `(B, C, H, W)`.
        sigma: Smallest and largest support, in input pixels; supports are uniformly distributed between them.
        groups: Groups of channels, each with its own supports.
        stride: Output cells are `stride` pixels apart.
        dtype: Dtype of the features, a key of `DTYPES`; logits and supports are at least fp32.
        device: `cpu`, `cuda` or `cuda:N`.
        channels_last: Whether the features are channels-last.
        smooth: Whether logits and supports vary smoothly over the map, as in real networks; otherwise they are
            independent from cell to cell.
        backward: Whether to compute gradients.

    Raises:
        ConfigError: A value is out of range, or the device does not exist.
    """
    shape: tuple[int, int, int, int]
    sigma: tuple[float, float]
    groups: int = 1
    stride: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'
    channels_last: bool = False
    smooth: bool = False
    backward: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != 4 or min(self.shape) < 1:
            given = ' '.join(map(str, self.shape))
            raise ConfigError(f'--shape must be four numbers B C H W of at least 1, got {given}')
        low, high = self.sigma
        if not 0 < low <= high < math.inf:
            raise ConfigError(f'--sigma must be MIN MAX with 0 < MIN <= MAX, got {low:g} {high:g}')
        if self.groups < 1 or self.shape[1] % self.groups:
            raise ConfigError(f'--groups must divide the {self.shape[1]} channels of --shape, got {self.groups}')
        if self.stride < 1:
            raise ConfigError(f'--stride must be >= 1, got {self.stride}')
        if self.dtype not in DTYPES:
            raise ConfigError(f'--dtype must be one of {", ".join(DTYPES)}, got {self.dtype!r}')
        check_device(self.device)

    @property
    def out_size(self) -> tuple[int, int]:
        """Size of the output, `(Ho, Wo)`."""
        return -(-self.shape[2] // self.stride), -(-self.shape[3] // self.stride)

    @property
    def mean_support(self) -> float:
        """Mean of the supports, in input pixels."""
        return sum(self.sigma) / 2

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the features."""
        return DTYPES[self.dtype]

    def with_side(self, side: int) -> 'Case':
        """Returns the same call on square maps of another size; supports in pixels do not change."""
        return dataclasses.replace(self, shape=(*self.shape[:2], side, side))

    def with_mean_support(self, mean: float) -> 'Case':
        """Returns the same call with supports scaled to another mean."""
        scale = mean / self.mean_support
        return dataclasses.replace(self, sigma=(self.sigma[0] * scale, self.sigma[1] * scale))

    def _maps(self, generator: torch.Generator, normal: bool, height: int, width: int) -> Tensor:
        b, g = self.shape[0], self.groups
        draw = torch.randn if normal else torch.rand
        if not self.smooth:
            return draw(b, g, height, width, generator=generator)
        coarse = draw(b, g, -(-height // SMOOTH_STEP) + 1, -(-width // SMOOTH_STEP) + 1, generator=generator)
        return F.interpolate(coarse, (height, width), mode='bilinear', align_corners=True)

    def inputs(self, seed: int = 0) -> tuple[Inputs, Tensor]:
        """Draws features, weight logits and supports, and a gradient of the output.

        Returns:
            `(x, weight_logits, sigma)` of shapes `(B, C, H, W)`, `(B, G, H, W)` and `(B, G, Ho, Wo)`, and a gradient
            `(B, C, Ho, Wo)` in the layout and dtype of `x`.
        """
        generator = torch.Generator().manual_seed(seed)
        b, c, h, w = self.shape
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        wide = torch.promote_types(self.torch_dtype, torch.float32)
        x = torch.randn(b, c, h, w, generator=generator)
        grad = torch.randn(b, c, *self.out_size, generator=generator)
        x, grad = (t.to(self.device, self.torch_dtype, memory_format=layout) for t in (x, grad))
        logits = self._maps(generator, True, h, w)
        low, high = self.sigma
        sigma = low + (high - low) * self._maps(generator, False, *self.out_size)
        return (x, logits.to(self.device, wide), sigma.to(self.device, wide)), grad


def check_device(name: str) -> None:
    """Checks that a device is the CPU or an existing CUDA device.

    Raises:
        ConfigError: It is not.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'--device must be cpu, cuda or cuda:N, got {name!r}') from error
    if device.type not in ('cpu', 'cuda'):
        raise ConfigError(f'--device must be cpu, cuda or cuda:N, got {name!r}')
    count = torch.cuda.device_count()
    if device.type == 'cuda' and not (torch.cuda.is_available() and (device.index or 0) < count):
        raise ConfigError(f'--device {name}: torch {torch.__version__} sees {count} CUDA devices; use --device cpu')
