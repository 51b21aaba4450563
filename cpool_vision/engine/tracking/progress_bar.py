"""Logging setup, and a progress bar on terminals."""
import logging
import sys

from tqdm import tqdm


class _TqdmHandler(logging.Handler):
    """Writes log records above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Logs to stderr: this package and timm from `level` on, other packages from WARNING on. Safe to call twice."""
    root = logging.getLogger()
    if any(isinstance(handler, _TqdmHandler) for handler in root.handlers):
        return
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    root.addHandler(handler)
    for name in ('cpool_vision', 'timm'):
        logging.getLogger(name).setLevel(level)


def silence_logging() -> None:
    """Logs only warnings. Called by every process but the first."""
    for name in ('cpool_vision', 'timm'):
        logging.getLogger(name).setLevel(logging.WARNING)


def format_time(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02d}:{second:02d}' if hours else f'{minute}:{second:02d}'


class ProgressBar:
    """Progress of a pass over a loader: a bar on a terminal, otherwise log lines. A context manager.

    Args:
        total: Number of batches.
        title: Text in front of the bar.
        enabled: Whether this process reports.
        interval: Steps between reports.
        done: Batches that are done already.
    """

    def __init__(self, total: int, title: str, enabled: bool, interval: int, done: int = 0) -> None:
        self.enabled = enabled
        self.interval = max(1, interval)
        self.bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True, file=sys.stderr, initial=done,
                        disable=None if enabled else True)  # None: disabled unless stderr is a terminal

    def due(self, step: int, last: bool) -> bool:
        """Returns whether to report after this step; the same on all processes."""
        return last or step % self.interval == 0

    def advance(self) -> None:
        """Counts a batch as done."""
        self.bar.update(1)

    def report(self, logger: logging.Logger, line: str, short: str) -> None:
        """Shows `short` beside the bar or, without a bar, logs `line`."""
        if not self.bar.disable:
            self.bar.set_postfix_str(short, refresh=False)
        elif self.enabled:
            logger.info(line)

    def __enter__(self) -> 'ProgressBar':
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
