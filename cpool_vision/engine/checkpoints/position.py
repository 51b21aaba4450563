"""Where a run stands within its epochs."""
import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cpool_vision.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Position:
    """A boundary between two updates.

    Attributes:
        epoch: current epoch, from 0.
        batch: batches of it that this process has trained on; the same on all processes.
        skipped: updates of it that were left out, see `--nonfinite`.
        skipped_before: updates left out in earlier epochs.
    """

    epoch: int = 0
    batch: int = 0
    skipped: int = 0
    skipped_before: int = 0

    def next_epoch(self) -> 'Position':
        """The start of the next epoch."""
        return Position(self.epoch + 1, 0, 0, self.skipped_before + self.skipped)


def _facts(args: argparse.Namespace, batches: int, streamed: bool) -> dict[str, Any]:
    facts = {'number of processes': args.world_size, '--grad-accum-steps': args.grad_accum_steps, '--seed': args.seed,
             '--batch-size': args.batch_size, 'number of batches per epoch': batches}
    return {**facts, '--workers': args.workers} if streamed else facts


def describe_position(position: Position, args: argparse.Namespace, batches: int, streamed: bool) -> dict[str, Any]:
    """What a checkpoint stores of a position.

    Args:
        position: where the run stands.
        args: settings.
        batches: batches per epoch and process.
        streamed: whether the batches depend on the number of workers.
    """
    return {**asdict(position), 'facts': _facts(args, batches, streamed)}


def read_position(content: Mapping[str, Any], path: str) -> Position | None:
    """Position in a checkpoint, None if it stores none.

    Raises:
        CheckpointError: unusable.
    """
    stored = content.get('position')
    if stored is None:
        return None
    try:
        return Position(**{name: int(stored[name]) for name in Position.__dataclass_fields__})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path!r} holds no usable position ({stored!r}): use another checkpoint') from error


def check_same_batches(content: Mapping[str, Any], path: str, args: argparse.Namespace, batches: int, streamed: bool,
                       ) -> None:
    """Refuses to go on inside an epoch whose batches would not be those of the former run.

    Raises:
        ConfigError: names the setting that differs.
    """
    now = _facts(args, batches, streamed)
    facts = content['position'].get('facts')
    for name, former in facts.items() if isinstance(facts, Mapping) else ():
        if now.get(name, former) != former:
            raise ConfigError(
                f'--resume {path!r} stands inside an epoch, of which the batches were cut with {name} {former}, now '
                f'{now[name]}: resume with the former value, or from the checkpoint of a whole epoch')
