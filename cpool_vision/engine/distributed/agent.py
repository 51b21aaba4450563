"""Stops training processes whose torchrun was killed, so that they do not continue unattended."""
import os
import signal
import threading
import time

_PERIOD = 1.  # seconds between checks
_PATIENCE = 30.  # seconds to save the run; torchrun itself allows as much


class AgentWatch:
    """While entered, a thread checks whether the parent of this process is alive. Does nothing without torchrun.

    When the parent is gone, the thread sends SIGTERM, which asks the run to save and stop (see `signals.StopSignals`)
    or ends a process that still waits for the others. It ends the process if it still runs after 30 seconds.
    """

    def __init__(self, period: float = _PERIOD, patience: float = _PATIENCE) -> None:
        self.period, self.patience = period, patience
        self._done = threading.Event()
        self._parent = os.getppid()

    def __enter__(self) -> 'AgentWatch':
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            threading.Thread(target=self._watch, name='agent watch', daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
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
