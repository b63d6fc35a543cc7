"""What a node of a cluster does with a job of a sweep.

It imports nothing that takes time or memory: the job has a process of its own, in which it does that.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib_pack.process import in_own_process

THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Parcel:
    """A job, and what it needs around it.

    Attributes:
        job: Pickled pair of a function, which takes an argument and the file of its log, and this argument.
        folder: Working directory, against which paths resolve.
        modules: Where modules are looked for, beside those of the node.
        files: Files and folders that the node must have.
        threads: Of the job.
    """

    job: bytes
    folder: str
    modules: list[str]
    files: list[str]
    threads: int


def run_parcel(parcel: Parcel) -> tuple[dict[str, Any], bytes]:
    """Run a job.

    Returns:
        What the function returns, or its `error` in one line, and the log.
    """
    try:
        _enter(parcel)
        with TemporaryDirectory() as folder:
            log = Path(folder, "log")
            log.touch()
            try:
                return in_own_process(_open, parcel.job, log), log.read_bytes()
            except Exception as error:  # the process was killed, or its result cannot be passed on
                return _failed(error), log.read_bytes()
    except OSError as error:  # a file that is not there, a full disk
        return _failed(error), str(error).encode()


def _enter(parcel: Parcel) -> None:
    """Go where the job is to run.

    Raises:
        OSError: If the node lacks a file or folder; the message names it and the node.
    """
    for path in (parcel.folder, *(os.path.join(parcel.folder, file) for file in parcel.files)):  # noqa: PTH118
        if not os.access(path, os.R_OK):
            msg = f"{path} cannot be read on the node {socket.gethostname()}. Every node needs it at the same path."
            raise FileNotFoundError(msg)
    os.chdir(parcel.folder)
    os.environ[THREADS] = str(parcel.threads)
    sys.path += [path for path in parcel.modules if path not in sys.path]


def _open(job: bytes, log: Path) -> dict[str, Any]:
    with log.open("ab") as file:  # takes what imports have to say, too
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    function, argument = pickle.loads(job)
    return function(argument, log)


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}", "host": socket.gethostname()}
