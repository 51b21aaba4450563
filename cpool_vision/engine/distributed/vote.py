"""Agreement between processes, such as on whether an update is finite and whether the run stops after it."""
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed

from cpool_vision.errors import UserError

from .sharding import local_part
from .signals import StopSignals


@dataclass(frozen=True)
class Verdict:
    """Result of a vote, the same on all processes.

    Attributes:
        loss_finite: Whether the loss is finite on all processes.
        gradient_finite: Whether the gradients are finite on all processes.
        signal: Highest number of a signal that a process received, 0 for none.
    """

    loss_finite: bool
    gradient_finite: bool
    signal: int


class Vote:
    """Votes with one all-reduce of three numbers and one copy from the device to the host.

    Args:
        device: Device of the losses.
        distributed: Whether there are several processes.
        signals: Signals that this process received.
    """

    def __init__(self, device: torch.device, distributed: bool, signals: StopSignals | None = None) -> None:
        self.device, self.distributed = device, distributed
        self.signals = signals or StopSignals()

    def take(self, loss: torch.Tensor | None = None, gradients: Iterable[torch.Tensor] = ()) -> Verdict:
        """Votes on an update; every process must call it.

        Args:
            loss: Scalar loss, or None.
            gradients: Gradients of the update, reduced over processes.

        Returns:
            The result.
        """
        finite = torch.ones((), device=self.device)
        # the infinity norm, because a sum of squares overflows in half precision
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
    """Returns whether any process failed. Every process must call it, and none returns before all have called it."""
    if not distributed:
        return failed
    flag = torch.tensor(float(failed), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


@contextmanager
def fail_together(kind: type[UserError], message: str, device: torch.device, distributed: bool) -> Iterator[None]:
    """Makes the body fail on all processes if it fails on one. Every process must enter it.

    Args:
        kind: Type of the expected errors.
        message: Message on the processes whose own body succeeded.
        device: Device for collective operations.
        distributed: Whether there are several processes.
    """
    error: UserError | None = None
    try:
        yield
    except kind as caught:
        error = caught
    failed = agree_on_failure(error is not None, device, distributed)
    if error is not None:
        raise error
    if failed:
        raise kind(message)


def agree_on_text(text: str, device: torch.device, distributed: bool) -> bool:
    """Returns whether all processes have the same text. Every process must call it."""
    if not distributed:
        return True
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little') >> 1  # fits a signed 64-bit integer
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])
