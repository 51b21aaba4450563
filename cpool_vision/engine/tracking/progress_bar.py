"""Log lines, and a progress bar where there is a terminal."""
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class _TqdmHandler(logging.Handler):
    """Writes log records above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Sends log records to stderr, once; those of other packages from WARNING up, except timm's."""
    root = logging.getLogger()
    if any(isinstance(handler, _TqdmHandler) for handler in root.handlers):
        return
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    root.addHandler(handler)
    for name in ('cpool_vision', 'timm'):
        logging.getLogger(name).setLevel(level)


def silence_logging() -> None:
    """Leaves warnings only: for every process but the first."""
    for name in ('cpool_vision', 'timm'):
        logging.getLogger(name).setLevel(logging.WARNING)


def format_time(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02d}:{second:02d}' if hours else f'{minute}:{second:02d}'


class ProgressBar:
    """A pass over a loader: a bar on a terminal, log lines elsewhere, nothing on secondary processes.

    Args:
        total: number of batches.
        title: text before the bar.
        enabled: whether this process reports.
        interval: steps between reports.
    """

    def __init__(self, total: int, title: str, enabled: bool, interval: int) -> None:
        self.enabled = enabled
        self.interval = max(1, interval)
        self.bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True, file=sys.stderr) \
            if enabled and sys.stderr.isatty() else None

    def due(self, step: int, last: bool) -> bool:
        """Whether a report is due after this step; the same on all processes."""
        return last or step % self.interval == 0

    def advance(self) -> None:
        """One batch is done."""
        if self.bar is not None:
            self.bar.update(1)

    def report(self, logger: logging.Logger, line: str, short: str) -> None:
        """Shows figures: `short` beside the bar, or `line` in the log."""
        if self.bar is not None:
            self.bar.set_postfix_str(short, refresh=False)
        elif self.enabled:
            logger.info(line)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def progress_bar(total: int, title: str, enabled: bool, interval: int, done: int = 0) -> Iterator[ProgressBar]:
    """A `ProgressBar` that is closed whatever happens; `done` batches count as passed."""
    shown = ProgressBar(total, title, enabled, interval)
    for _ in range(done):
        shown.advance()
    try:
        yield shown
    finally:
        shown.close()
