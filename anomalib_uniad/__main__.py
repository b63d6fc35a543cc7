"""Commands for pictures of reconstructed features: ``python -m anomalib_uniad --help``."""

import anomalib.data  # noqa: F401  so that --data takes the names of Anomalib's datamodules
from jsonargparse import auto_cli

from .rendering import render, train_renderer

if __name__ == "__main__":
    auto_cli([train_renderer, render], as_positional=False, prog="python -m anomalib_uniad")
