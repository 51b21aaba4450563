"""The progress of a training run. Checkpoints store it under the key `position`."""
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cpool_vision.errors import CheckpointError, ConfigError

from ..settings.train import TrainSettings


@dataclass(frozen=True)
class Progress:
    """How far a training run is, always between two updates.

    Attributes:
        epoch: current epoch, from 0.
        batch: batches of this epoch that each process has trained on.
        skipped: skipped updates of this epoch, see `--nonfinite`.
        skipped_before: skipped updates of earlier epochs.
    """

    epoch: int = 0
    batch: int = 0
    skipped: int = 0
    skipped_before: int = 0

    def next_epoch(self) -> 'Progress':
        """The start of the next epoch."""
        return Progress(self.epoch + 1, 0, 0, self.skipped_before + self.skipped)


def read_progress(content: Mapping[str, Any], path: str) -> Progress | None:
    """Progress in a checkpoint, None if it stores none.

    Raises:
        CheckpointError: unusable.
    """
    stored = content.get('position')
    if stored is None:
        return None
    try:
        return Progress(**{name: int(stored[name]) for name in Progress.__dataclass_fields__})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path!r} holds no usable progress ({stored!r}): use another checkpoint') from error


@dataclass(frozen=True)
class BatchFacts:
    """What the batches of an epoch depend on, besides the data.

    Attributes:
        settings: seed, batch size, accumulation and number of workers.
        world_size: number of processes.
        batches: batches per epoch and process.
        streamed: whether the batches depend on the number of workers.
    """

    settings: TrainSettings
    world_size: int
    batches: int
    streamed: bool

    def as_dict(self) -> dict[str, int]:
        """The facts by the names that messages use."""
        facts = {
            'number of processes': self.world_size, '--grad-accum-steps': self.settings.grad_accum_steps,
            '--seed': self.settings.seed, '--batch-size': self.settings.batch_size,
            'number of batches per epoch': self.batches}
        return {**facts, '--workers': self.settings.workers} if self.streamed else facts

    def describe(self, progress: Progress) -> dict[str, Any]:
        """What a checkpoint stores of a progress."""
        return {**asdict(progress), 'facts': self.as_dict()}

    def check(self, content: Mapping[str, Any], path: str) -> None:
        """Refuses to continue inside an epoch if its batches would differ from those of the earlier run.

        Raises:
            ConfigError: names the setting that differs.
        """
        now, facts = self.as_dict(), content['position'].get('facts')
        for name, former in facts.items() if isinstance(facts, Mapping) else ():
            if now.get(name, former) != former:
                raise ConfigError(
                    f'--resume {path!r} is from the middle of an epoch whose batches were made with {name} {former}, '
                    f'now {now[name]}: resume with the old value, or from a checkpoint at the end of an epoch')
