"""One HTML file of runs: ``anomalib report RUN [RUN ...] [--out FILE]``.

From the outside in::

    pipeline.py     the subcommand
    runs.py         what is read of runs and sweeps
    interest.py     which images matter most
    tables.py       groups of images and metrics of each run
    pictures.py     pictures small enough to lie in the page, as many as fit
    document.py     the page: template, style and script, and the data in it
    page/           template, style and script, which draws everything but the metrics in the browser
"""

from anomalib_pack.report.pipeline import Report

__all__ = ["Report"]
