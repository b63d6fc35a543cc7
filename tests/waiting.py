"""Waiting for what other processes do, on machines that may be slow or busy: only what hangs takes so long."""

import os
import time
from collections.abc import Callable
from subprocess import Popen

TIMEOUT = int(os.environ.get("COMMAND_TIMEOUT", "900"))  # seconds


def wait_until(condition: Callable[[], bool], *processes: Popen) -> None:
    """Fail if it takes too long, or one of the processes ends before."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.05)
