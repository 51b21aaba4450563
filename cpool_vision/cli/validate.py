"""Command line for validation: `python validate.py` or `cpool-validate`."""
import json
import os
import sys
from collections.abc import Sequence

from . import common


def _validate(argv: Sequence[str] | None) -> None:
    from cpool_vision.engine.settings.config import read_validate

    settings = read_validate(argv)
    from cpool_vision.engine.validate.bulk import run_validation  # imported late, so that --help is fast
    from cpool_vision.engine.validate.results import finite, scalars

    results = run_validation(settings)
    if os.environ.get('RANK', '0') == '0':
        shown = scalars(results) if isinstance(results, dict) else [scalars(row) for row in results]
        print(f'--result\n{json.dumps(finite(shown), indent=4)}')


def main(argv: Sequence[str] | None = None) -> int:
    """Validates models, see `--help`. Returns the exit code."""
    return common.run(_validate, argv)


if __name__ == '__main__':
    sys.exit(main())
