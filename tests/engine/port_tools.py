"""A port for processes that meet on this machine."""
import socket


def free_port() -> int:
    """A port that nobody listens on: chosen by the system, as a number drawn here may be that of another run."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])
