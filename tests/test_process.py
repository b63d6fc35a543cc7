"""Work in a process of its own."""

import os
import signal

import pytest

from anomalib_pack.process import in_own_process


def test_result() -> None:
    assert in_own_process(os.getpid) != os.getpid()


def test_error_of_the_work() -> None:
    with pytest.raises(ZeroDivisionError):
        in_own_process(divmod, 1, 0)


def test_killed() -> None:
    with pytest.raises(RuntimeError, match="killed, perhaps for lack of memory"):
        in_own_process(signal.raise_signal, signal.SIGKILL)
