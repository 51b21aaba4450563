"""What both commands share: logging, errors as one line, exit codes."""
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cpool_vision.engine.distributed.signals import StopRequested
from cpool_vision.engine.tracking.progress_bar import setup_logging
from cpool_vision.errors import UserError


def run(command: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None) -> int:
    """Runs a command and turns errors that a user can act on into one line on stderr.

    With CPOOL_DEBUG=1 in the environment the traceback is shown instead.

    Args:
        command: does the work.
        argv: arguments, those of the process if None.

    Returns:
        Exit code: 0, that of the error (2 for bad input), 130 after an interrupt, or 143 after another signal.
    """
    setup_logging()
    try:
        command(argv)
    except StopRequested as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except UserError as error:
        if os.environ.get('CPOOL_DEBUG', '0') not in ('', '0'):
            raise
        rank = os.environ.get('RANK', '0')
        where = f' [process {rank}]' if rank != '0' else ''
        print(f'error{where}: {" ".join(str(error).split())}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    return 0
