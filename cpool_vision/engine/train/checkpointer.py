"""Saves a run after updates and epochs, on all processes together."""
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch.distributed

from cpool_vision.errors import CheckpointError, OutputError

from ..checkpoints.progress import Progress
from ..checkpoints.resume import list_candidates
from ..checkpoints.saver import CheckpointSaver, TrainState
from ..data import fingerprint
from ..distributed.sharding import trained_module
from ..distributed.signals import StopRequested
from ..distributed.vote import Verdict, fail_together
from .run import Run

_logger = logging.getLogger(__name__)


def _statistics(run: Run) -> Iterator[torch.Tensor]:
    """Yields the running statistics of batch norm, which differ between processes until they are averaged."""
    for module in (trained_module(run.task), run.task.get_trainable_module(ema=True)):
        if run.runtime.distributed and module is not None:
            for name, buffer in module.named_buffers():
                if name.endswith(('running_mean', 'running_var')):
                    yield buffer


def gather_process_state(run: Run) -> torch.Tensor:
    """Gathers the loss sums and batch norm statistics of each process. Every process must call it.

    Returns:
        `(processes, n)`, float64 (float32 on mps), on the CPU.
    """
    mine = torch.cat([run.meter.sums, *[buffer.flatten().to(run.meter.sums) for buffer in _statistics(run)]])
    if not run.runtime.distributed:
        return mine[None].cpu()
    rows = [torch.empty_like(mine) for _ in range(run.runtime.world_size)]
    torch.distributed.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def load_process_state(run: Run, rows: object, path: str) -> None:
    """Restores the state of this process from `gather_process_state`. Does nothing if the number of processes changed.

    Raises:
        CheckpointError: If `rows` is not a result of that function.
    """
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or rows.shape[1] < 4:
        raise CheckpointError(f'{path!r} contains no valid state of the processes: use another checkpoint')
    if rows.shape[0] != run.runtime.world_size:
        return
    mine = rows[run.runtime.rank].to(run.meter.sums)
    run.meter.sums.copy_(mine[:4])
    buffers = list(_statistics(run))
    if sum(buffer.numel() for buffer in buffers) != len(mine) - 4:  # for example, the average is new
        return
    for buffer, part in zip(buffers, mine[4:].split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def batch_facts(run: Run) -> dict[str, int]:
    """Returns the values that the batches of an epoch depend on besides the data, by the names that messages use."""
    settings = run.settings
    facts = {
        'number of processes': run.runtime.world_size, '--grad-accum-steps': settings.grad_accum_steps,
        '--seed': settings.seed, '--batch-size': settings.batch_size, 'number of batches per epoch': len(run.loader)}
    if getattr(run.loader, 'batch_sampler', None) is None:  # a streamed dataset
        facts['--workers'] = settings.workers
    return facts


class Checkpointer:
    """Saves a run. Every process must call its methods.

    Args:
        run: The run.
        state: The state to save.
        saver: Writes the files on the first process; None elsewhere.
        interval: Updates between checkpoints inside an epoch, 0 for none.
    """

    def __init__(self, run: Run, state: TrainState, saver: CheckpointSaver | None, interval: int) -> None:
        self.run, self.state, self.saver, self.interval = run, state, saver, interval

    def _save(self, progress: Progress, write: Callable[[CheckpointSaver], object]) -> None:
        run = self.run
        self.state.extra = {
            'position': {**asdict(progress), 'facts': batch_facts(run)},
            'processes': gather_process_state(run),
            **({} if run.data is None else {fingerprint.KEY: run.data}),
        }
        self.state.gather(keep=self.saver is not None)
        message = 'the first process cannot write the checkpoint: see its message'
        # every process waits until the file is written: torchrun ends all processes when one exits
        with fail_together(OutputError, message, run.runtime.device, run.runtime.distributed):
            if self.saver is not None:
                write(self.saver)

    def _save_recovery(self, progress: Progress) -> None:
        self._save(progress, lambda saver: saver.save_recovery(self.state, progress))

    def after_update(self, update: int, last: bool, verdict: Verdict) -> None:
        """Saves at the interval, or if a signal stops the run.

        Args:
            update: Updates in this epoch.
            last: Whether it is the last update of the epoch. With an interval, the run is saved before validation.
            verdict: Says whether a process received a signal.

        Raises:
            StopRequested: If a process received a signal. The run is saved.
            OutputError: If the checkpoint cannot be written.
        """
        if verdict.signal or self.interval and (last or update % self.interval == 0):
            self._save_recovery(self.run.progress)
        if verdict.signal:
            self._stop(verdict.signal, self.run.progress)

    def after_epoch(self, metric: float | None, final: bool) -> None:
        """Saves a finished epoch, and stops if a process received a signal since the last update.

        Args:
            metric: Metric that ranks the checkpoint, or None to save nothing because the epoch was not validated.
            final: Whether it is the last epoch.

        Raises:
            StopRequested: See `after_update`.
            OutputError: See `after_update`.
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
        # --resume auto finds only the folder of an --experiment
        where = 'auto' if self.run.settings.experiment or self.saver is None else list_candidates(self.saver.folder)[0]
        raise StopRequested(signal, f'stopped by a signal and saved before batch {progress.batch} of epoch '
                                    f'{progress.epoch}: continue with the same flags and --resume {where}')
