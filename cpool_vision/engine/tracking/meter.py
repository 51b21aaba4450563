"""Mean loss of an epoch."""
import torch
import torch.distributed


class LossMeter:
    """Averages the loss over images, for the epoch and since the last report. Stays on the device until it is read.

    Attributes:
        sums: Loss and images of the epoch, loss and images since the report: `(4,)`, float64 (float32 on mps).
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
        """Returns the mean loss of the epoch and since the last report over all processes, and starts a new report."""
        sums = self.sums.clone()
        if distributed:
            torch.distributed.all_reduce(sums)
        total, images, recent, recent_images = sums.tolist()
        self.sums[2:] = 0
        mean = total / images if images else float('nan')
        return mean, recent / recent_images if recent_images else mean

    def clear(self) -> None:
        """Starts a new epoch."""
        self.sums.zero_()
