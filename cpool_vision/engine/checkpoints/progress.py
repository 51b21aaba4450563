"""The progress of a training run. Checkpoints store it under the key `position`."""
from collections.abc import Mapping
from dataclasses import dataclass

from cpool_vision.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Progress:
    """Progress of a training run between two updates.

    Attributes:
        epoch: Current epoch, starting at 0.
        batch: Batches of this epoch that each process has trained on.
        skipped: Skipped updates of this epoch; see `--nonfinite`.
        skipped_before: Skipped updates of earlier epochs.
    """

    epoch: int = 0
    batch: int = 0
    skipped: int = 0
    skipped_before: int = 0

    def next_epoch(self) -> 'Progress':
        """Returns the start of the next epoch."""
        return Progress(self.epoch + 1, 0, 0, self.skipped_before + self.skipped)


def read_progress(content: Mapping[str, object], path: str) -> Progress | None:
    """Reads the progress from a checkpoint; None if it stores none.

    Raises:
        CheckpointError: If the stored progress is invalid.
    """
    stored = content.get('position')
    if stored is None:
        return None
    try:
        if not isinstance(stored, Mapping):
            raise TypeError
        return Progress(**{name: int(stored[name]) for name in Progress.__dataclass_fields__})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path!r} contains no valid progress ({stored!r}): use another checkpoint') from error


def check_batch_facts(content: Mapping[str, object], facts: Mapping[str, int], path: str) -> None:
    """Refuses to continue inside an epoch if its batches would differ from those of the earlier run.

    Args:
        content: Dictionary of the checkpoint.
        facts: What the batches depend on now, by the names that messages use.
        path: File of the checkpoint, for messages.

    Raises:
        ConfigError: If a value differs from the one stored in the checkpoint.
    """
    stored = content.get('position')
    saved = stored.get('facts') if isinstance(stored, Mapping) else None
    for name, former in saved.items() if isinstance(saved, Mapping) else ():
        if facts.get(name, former) != former:
            raise ConfigError(
                f'--resume {path!r} is from the middle of an epoch whose batches were made with {name} {former}, '
                f'now {facts[name]}: resume with the old value, or from a checkpoint at the end of an epoch')
