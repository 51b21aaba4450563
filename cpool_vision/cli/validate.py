"""Command line of validation: `python validate.py` or `cpool-validate`."""
import json
import sys
from collections.abc import Sequence

from . import common


def _validate(argv: Sequence[str] | None) -> None:
    from cpool_vision.engine.args_validate import build_parser
    from cpool_vision.engine.bulk import run_validation
    from cpool_vision.engine.config import parse_args

    results = run_validation(parse_args(build_parser, argv))
    print(f'--result\n{json.dumps(results, indent=4)}')


def main(argv: Sequence[str] | None = None) -> int:
    """Measures models; see `--help`. Returns the exit code."""
    return common.run(_validate, argv)


if __name__ == '__main__':
    sys.exit(main())
