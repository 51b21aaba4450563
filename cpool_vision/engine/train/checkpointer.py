"""When a run is saved: at the boundaries between updates and between epochs, by all processes together."""
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed

from cpool_vision.errors import CheckpointError, OutputError

from ..checkpoints.progress import BatchFacts, Progress
from ..checkpoints.resume import list_candidates
from ..checkpoints.saver import CheckpointSaver, TrainState
from ..data import fingerprint
from ..distributed.signals import StopRequested
from ..distributed.vote import Verdict, agree_on_failure
from .run import Run

_logger = logging.getLogger(__name__)


def _statistics(run: Run) -> Iterator[torch.Tensor]:
    """Running statistics of batch norm, of which each process has its own until they are averaged."""
    task: Any = run.task
    for module in (task.get_trainable_module(), task.get_trainable_module(ema=True)):
        if run.runtime.distributed and module is not None:
            for name, buffer in module.named_buffers():
                if name.endswith(('running_mean', 'running_var')):
                    yield buffer


def gather_process_state(run: Run) -> torch.Tensor:
    """What each process holds for itself: sums of the loss and statistics of batch norm; every process must call it.

    Returns:
        `(processes, n)`, float64 (float32 on mps), on the CPU.
    """
    mine = torch.cat([run.meter.sums, *[buffer.flatten().to(run.meter.sums) for buffer in _statistics(run)]])
    if not run.runtime.distributed:
        return mine[None].cpu()
    rows = [torch.empty_like(mine) for _ in range(run.runtime.world_size)]
    torch.distributed.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def load_process_state(run: Run, rows: torch.Tensor, path: str) -> None:
    """Gives this process what `gather_process_state` took from the one of its rank; none if their number changed.

    Raises:
        CheckpointError: not what that function gives.
    """
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or rows.shape[1] < 4:
        raise CheckpointError(f'{path!r} holds no usable state of the processes: use another checkpoint')
    if rows.shape[0] != run.runtime.world_size:
        return
    mine = rows[run.runtime.rank].to(run.meter.sums)
    run.meter.sums.copy_(mine[:4])
    buffers = list(_statistics(run))
    if sum(buffer.numel() for buffer in buffers) != len(mine) - 4:  # the average is new, say
        return
    for buffer, part in zip(buffers, mine[4:].split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def batch_facts(run: Run) -> BatchFacts:
    """What the batches of the run depend on."""
    streamed = getattr(run.loader, 'batch_sampler', None) is None
    return BatchFacts(run.settings, run.runtime.world_size, len(run.loader), streamed)


class Checkpointer:
    """Saves a run; its methods must be called by every process.

    Args:
        run: the run.
        state: what is saved.
        saver: writes the files, on the first process; None on the others.
        interval: updates between checkpoints inside an epoch, 0 for none.
    """

    def __init__(self, run: Run, state: TrainState, saver: CheckpointSaver | None, interval: int) -> None:
        self.run, self.state, self.saver, self.interval = run, state, saver, interval

    def _save(self, progress: Progress, write: Callable[[CheckpointSaver], Any]) -> None:
        run = self.run
        self.state.extra = extra = {
            'position': batch_facts(run).describe(progress),
            'processes': gather_process_state(run),
        }
        if run.data is not None:
            extra[fingerprint.KEY] = run.data
        self.state.gather(keep=self.saver is not None)
        error: OutputError | None = None
        if self.saver is not None:
            try:
                write(self.saver)
            except OutputError as caught:
                error = caught
        # nobody leaves before the file stands: torchrun ends all processes when the first one exits
        failed = agree_on_failure(error is not None, run.runtime.device, run.runtime.distributed)
        if error is not None:
            raise error
        if failed:
            raise OutputError('the first process cannot write the checkpoint: see its message')

    def _save_recovery(self, progress: Progress) -> None:
        self._save(progress, lambda saver: saver.save_recovery(self.state, progress))

    def after_update(self, update: int, last: bool, verdict: Verdict) -> None:
        """Saves if it is time, or if the run shall stop.

        Args:
            update: updates made in this epoch.
            last: whether the epoch has no more; with an interval it is saved before validation.
            verdict: whether to stop.

        Raises:
            StopRequested: a process received a signal; the run is saved.
            OutputError: the checkpoint cannot be written.
        """
        if verdict.signal or self.interval and (last or update % self.interval == 0):
            self._save_recovery(self.run.progress)
        if verdict.signal:
            self._stop(verdict.signal, self.run.progress)

    def after_epoch(self, metric: float | None, final: bool) -> None:
        """Saves a finished epoch, and stops if a signal came in the meantime.

        Args:
            metric: what the checkpoint is ranked by, None if the epoch was not validated and is not saved.
            final: whether it is the last epoch.

        Raises:
            StopRequested, OutputError: see `after_update`.
        """
        epoch, progress = self.run.progress.epoch, self.run.progress.next_epoch()
        if metric is not None:
            self._save(progress, lambda saver: saver.save(
                self.state, epoch, metric, milestone=epoch + 1 in self.run.settings.save_epochs))
        verdict = self.run.vote.take()
        if verdict.signal and not final:
            if metric is None:
                self._save_recovery(progress)
            self._stop(verdict.signal, progress)

    def _stop(self, signal: int, progress: Progress) -> None:
        # without its own name the run would get another folder
        where = 'auto' if self.run.settings.experiment or self.saver is None else list_candidates(self.saver.folder)[0]
        raise StopRequested(signal, f'stopped by a signal and saved before batch {progress.batch} of epoch '
                                    f'{progress.epoch}: continue with the same flags and --resume {where}')
