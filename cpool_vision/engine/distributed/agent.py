"""Stops training processes whose torchrun was killed, so that they do not continue unattended."""
import os
import signal
import threading
import time
from typing import Any

_PERIOD, _PATIENCE = 1., 30.  # seconds between looks; and to save, as long as torchrun itself gives


class AgentWatch:
    """While entered, a thread looks whether the parent of this process is still there.

    When it is gone, SIGTERM asks the run to save and stop, see `signals.StopSignals`, or ends a process that still
    waits for the others; what is still there after 30 seconds is ended. Does nothing without torchrun.
    """

    def __init__(self, period: float = _PERIOD, patience: float = _PATIENCE) -> None:
        self.period, self.patience = period, patience
        self._done = threading.Event()
        self._parent = os.getppid()

    def __enter__(self) -> 'AgentWatch':
        if 'TORCHELASTIC_RUN_ID' in os.environ and hasattr(os, 'getppid'):
            threading.Thread(target=self._watch, name='agent watch', daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(self.period):
            if os.getppid() != self._parent:
                os.write(2, b'torchrun is gone: saving after this update, then stopping\n')
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(self.patience)
                if not self._done.is_set():
                    os._exit(143)
                return
