"""A process of its own for each piece of work, so that neither its memory nor its end touches the others."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def in_own_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Run a function of a module in a new process; arguments and result are pickled.

    Raises:
        RuntimeError: If the process is killed or crashes.
    """
    # Spawned, not forked: it starts small, and CUDA does not work in forks.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            msg = "the process was killed, perhaps for lack of memory, or crashed"
            raise RuntimeError(msg) from error
