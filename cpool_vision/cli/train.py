"""Command line of training: `python train.py`, `cpool-train`, or `torchrun train.py`."""
import json
import sys
from collections.abc import Sequence

from . import common


def _train(argv: Sequence[str] | None) -> None:
    from cpool_vision.engine.settings.config import read_train

    settings = read_train(argv)
    from cpool_vision.engine.train.fit import train  # after the flags, so that --help need not wait

    result = train(settings)
    if result:
        print(f'--result\n{json.dumps(result, indent=4)}')


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a model; see `--help`. Returns the exit code."""
    return common.run(_train, argv)


if __name__ == '__main__':
    sys.exit(main())
