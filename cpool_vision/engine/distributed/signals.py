"""Signals that ask a run to stop: noted at once, acted on between two updates."""
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from cpool_vision.errors import UserError

_NAMES = ('SIGTERM', 'SIGUSR1', 'SIGINT')
_ECHO = 2.  # seconds within which torchrun passes on what the terminal or the scheduler sent to every process already


class StopRequested(UserError):
    """The run was asked to stop by a signal, and is saved.

    Args:
        number: of the signal.
        text: where the run stopped, and how to continue.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 130 if number == signal.SIGINT else 143


class StopSignals:
    """While entered, notes SIGTERM, SIGUSR1 and SIGINT instead of obeying them.

    A second signal has its former effect at once, by default the end of the process. Under torchrun, repetitions within
    two seconds count as the first. Does nothing outside the main thread.

    Attributes:
        number: of the signal that came first, 0 if none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._when = 0.
        self._former: dict[int, Any] = {}
        self._echo = _ECHO if 'TORCHELASTIC_RUN_ID' in os.environ else 0.

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, signal.SIG_DFL if former is None else former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._when = number, time.monotonic()
            name = signal.Signals(number).name
            # not the log, which may be in the middle of a line
            os.write(2, f'{name}: saving after this update, then stopping; once more to stop at once\n'.encode())
        elif time.monotonic() - self._when >= self._echo:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
