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
        job: Pickled pair of a function, which takes an argument and a folder for what it writes, and this argument.
        log: File below this folder that takes all output.
        folder: Working directory, against which paths resolve.
        modules: Where modules are looked for, beside those of the node.
        files: Files and folders that the node must have.
        threads: Of the job.
    """

    job: bytes
    log: str
    folder: str
    modules: list[str]
    files: list[str]
    threads: int


def run_parcel(parcel: Parcel) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run a job.

    Returns:
        What the function returns, or its `error` in one line, and the files that it has written, by their paths.
    """
    try:
        _enter(parcel)
        with TemporaryDirectory() as folder:
            Path(folder, parcel.log).parent.mkdir(parents=True, exist_ok=True)
            try:
                results = in_own_process(_open, parcel, Path(folder))
            except Exception as error:  # the process was killed, or its result cannot be passed on
                results = _failed(error)
            return results, _files_in(Path(folder))
    except OSError as error:  # a file that is not there, a full disk
        return _failed(error), {parcel.log: str(error).encode()}


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


def _open(parcel: Parcel, folder: Path) -> dict[str, Any]:
    with (folder / parcel.log).open("ab") as file:  # takes what imports have to say, too
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    function, argument = pickle.loads(parcel.job)
    return function(argument, folder)


def _files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}", "host": socket.gethostname()}
