"""Command line of training: `python train.py`, `cpool-train`, or `torchrun train.py`."""
import gc
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import common

if TYPE_CHECKING:
    from cpool_vision.engine.train.fit import RunResult


def best_epochs(result: 'RunResult', most: int = 10) -> list[dict[str, object]]:
    """Formats the best epochs as timm's train.py prints them.

    Args:
        result: Result of `engine.train.fit.train`.
        most: Maximum number of epochs.

    Returns:
        `epoch`, `train` (the loss) and, if the epoch was validated, `validation` (its metrics), the best epoch last.
    """
    metric = result['metric']
    # among epochs ranked by another metric than the loss, one without validation comes first
    ranked = sorted(result['epochs'], reverse=metric == 'loss',
                    key=lambda row: row.get(f'eval_{metric}', row['train_loss'] if metric == 'loss' else 0.))
    epochs = []
    for row in ranked[-most:]:
        validation = {key.removeprefix('eval_'): value for key, value in row.items() if key.startswith('eval_')}
        epochs.append({'epoch': row['epoch'], 'train': {'loss': row['train_loss']},
                       **({'validation': validation} if validation else {})})
    return epochs


def _train(argv: Sequence[str] | None) -> None:
    from cpool_vision.engine.settings.config import read_train

    settings = read_train(argv)
    from cpool_vision.engine.train.fit import train  # slow to import, and not needed for --help

    result = train(settings)
    if result:
        print(f'--result\n{json.dumps(best_epochs(result), indent=4)}')


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a model; see `--help`. Returns the exit code."""
    code = common.run(_train, argv)
    from timm.utils.distributed import is_distributed_env

    if is_distributed_env():
        # reference cycles keep a DDP model and the threads of its process group alive; such a thread aborts the process
        # if it needs the interpreter during shutdown
        gc.collect()
    return code


if __name__ == '__main__':
    sys.exit(main())
