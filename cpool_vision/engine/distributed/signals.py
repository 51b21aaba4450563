"""Stops a run on a signal, between two updates."""
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeAlias

from cpool_vision.errors import UserError

_NAMES = ('SIGTERM', 'SIGUSR1', 'SIGINT')
# the terminal and the scheduler signal every process, and torchrun forwards the same signal within these seconds
_ECHO = 2.
Handler: TypeAlias = 'Callable[[int, FrameType | None], object] | int | None'


class StopRequested(UserError):
    """Raised when a signal has stopped the run and the run is saved.

    Args:
        number: Signal number.
        text: Message that says where the run stopped and how to continue.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 130 if number == signal.SIGINT else 143


class StopSignals:
    """While entered, stores SIGTERM, SIGUSR1 and SIGINT instead of ending the process.

    A second signal takes its previous effect at once; by default it ends the process. Under torchrun, repeated signals
    within two seconds count as one. Does nothing outside the main thread.

    Attributes:
        number: Number of the first signal, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._when = 0.
        self._former: dict[int, Handler] = {}
        self._echo = _ECHO if 'TORCHELASTIC_RUN_ID' in os.environ else 0.

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, signal.SIG_DFL if former is None else former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._when = number, time.monotonic()
            name = signal.Signals(number).name
            # not through the log, which may be writing a line
            os.write(2, f'{name}: saving after this update, then stopping; repeat it to stop at once\n'.encode())
        elif time.monotonic() - self._when >= self._echo:
            self.__exit__()
            os.kill(os.getpid(), number)
