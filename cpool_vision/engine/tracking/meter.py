"""Mean loss of an epoch."""
import torch
import torch.distributed


class LossMeter:
    """Sample-weighted loss of the epoch and since the last report, kept on the device.

    Attributes:
        sums: loss and images of the epoch, loss and images since the report: `(4,)`, float64 (float32 on mps).
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.sums = torch.zeros(4, dtype=dtype, device=device)

    def add(self, loss: torch.Tensor, images: int) -> None:
        """Adds the mean loss of a batch."""
        weighted = loss.detach().to(self.sums.dtype) * images
        count = torch.full_like(weighted, images)
        self.sums += torch.stack([weighted, count, weighted, count])

    def read(self, distributed: bool) -> tuple[float, float]:
        """Mean loss of the epoch and since the last report, over all processes; resets the latter."""
        sums = self.sums.clone()
        if distributed:
            torch.distributed.all_reduce(sums)
        total, images, recent, recent_images = sums.tolist()
        self.sums[2:] = 0
        mean = total / images if images else float('nan')
        return mean, recent / recent_images if recent_images else mean

    def clear(self) -> None:
        """Begins an epoch."""
        self.sums.zero_()
