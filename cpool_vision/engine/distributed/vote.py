"""What all processes must agree on before an update: whether it is finite, and whether the run stops after it."""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed

from .sharding import local_part
from .signals import StopSignals


@dataclass(frozen=True)
class Verdict:
    """Outcome of a vote, the same on all processes.

    Attributes:
        loss_finite, gradient_finite: on all of them.
        signal: number of the highest signal that any of them received, 0 for none.
    """

    loss_finite: bool
    gradient_finite: bool
    signal: int


class Vote:
    """Asks all processes in one all-reduce of three numbers, and the device in one copy to the host.

    Args:
        device: where the losses are.
        distributed: whether there are other processes.
        signals: what this process received.
    """

    def __init__(self, device: torch.device, distributed: bool, signals: StopSignals | None = None) -> None:
        self.device, self.distributed = device, distributed
        self.signals = signals or StopSignals()

    def take(self, loss: torch.Tensor | None = None, gradients: Iterable[torch.Tensor] = ()) -> Verdict:
        """Every process must call it.

        Args:
            loss: scalar, None for none.
            gradients: those of the update, reduced over processes; read once.
        """
        finite = torch.ones((), device=self.device)
        # the largest magnitude, as a sum of squares overflows in half precision
        parts = [part for part in map(local_part, gradients) if part.numel()]
        norm = torch.nn.utils.get_total_norm(parts, float('inf')).to(self.device)
        flags = torch.stack([
            finite if loss is None else torch.isfinite(loss.detach()).to(finite),
            torch.isfinite(norm).to(finite),
            finite * -self.signals.number,
        ])
        if self.distributed:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
        loss_finite, gradient_finite, signal = flags.tolist()
        return Verdict(bool(loss_finite), bool(gradient_finite), -int(signal))


def agree_on_failure(failed: bool, device: torch.device, distributed: bool) -> bool:
    """Whether any process failed; every process must call it, and none returns before all have."""
    if not distributed:
        return failed
    flag = torch.tensor(float(failed), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def agree_on_number(number: int, device: torch.device, distributed: bool) -> bool:
    """Whether all processes have the same number, of up to 63 bits; every process must call it."""
    if not distributed:
        return True
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])
