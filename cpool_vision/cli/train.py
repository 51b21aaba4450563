"""Command line of training: `python train.py`, `cpool-train`, or `torchrun train.py`."""
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import common


def best_epochs(result: Mapping[str, Any], most: int = 10) -> list[dict[str, Any]]:
    """Epochs in the form in which timm's train.py prints them: the best ones, in ascending order.

    Args:
        result: as `engine.train.fit.train` gives it.
        most: how many.

    Returns:
        `epoch`, `train` with the loss, and `validation` with its figures where the epoch was validated.
    """
    metric, epochs = result['metric'], []
    for row in result['epochs']:
        validation = {key.removeprefix('eval_'): value for key, value in row.items() if key.startswith('eval_')}
        epochs.append({'epoch': row['epoch'], 'train': {'loss': row['train_loss']},
                       **({'validation': validation} if validation else {})})
    epochs.sort(key=lambda each: each.get('validation', each['train']).get(metric, 0), reverse=metric == 'loss')
    return epochs[-most:]


def _train(argv: Sequence[str] | None) -> None:
    from cpool_vision.engine.settings.config import read_train

    settings = read_train(argv)
    from cpool_vision.engine.train.fit import train  # after the flags, so that --help need not wait

    result = train(settings)
    if result:
        print(f'--result\n{json.dumps(best_epochs(result), indent=4)}')


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a model; see `--help`. Returns the exit code."""
    code = common.run(_train, argv)
    from timm.utils.distributed import is_distributed_env

    if is_distributed_env():
        # a DDP model outlives its frames in cycles and keeps the threads of its process group, which abort the process
        # if they still need the interpreter when that ends
        gc.collect()
    return code


if __name__ == '__main__':
    sys.exit(main())
