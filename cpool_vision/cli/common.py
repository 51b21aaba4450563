"""Code that all commands share: logging, one-line errors and exit codes."""
import os
import sys
from collections.abc import Callable, Sequence

from cpool_vision.engine.distributed.signals import StopRequested
from cpool_vision.engine.tracking.progress_bar import setup_logging
from cpool_vision.errors import UserError


def run(command: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None) -> int:
    """Runs a command and prints errors that a user can act on as one line on stderr.

    Set CPOOL_DEBUG=1 in the environment to see the traceback instead.

    Args:
        command: Takes `argv` and does the work.
        argv: Command-line arguments; None for those of the process.

    Returns:
        Exit code: 0, the code of the error (2 for bad input), 130 after an interrupt, or 143 after another signal.
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
