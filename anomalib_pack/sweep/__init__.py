"""Many models on many data sets with many seeds: ``anomalib sweep --config configs/benchmark/quick.yaml``.

It is Anomalib's ``Benchmark`` for models that differ in their arguments, one that loses nothing when a job fails or the
sweep is stopped.

From the outside in::

    pipeline.py     the subcommand: checks, runs the jobs that have no results yet, reports
    settings.py     what a configuration may say, and the experiments that it stands for
    grid.py         `grid:` and the keys in which experiments differ
    components.py   models, data and trainer arguments out of a configuration, as `anomalib train` reads them
    job.py          one experiment in a process of its own
    cluster.py      jobs as tasks of Ray
    experiment.py   what happens in that process
    metrics.py      metrics by their names, where tables of papers ask for them
    throughput.py   images per second
    results.py      results.csv
    keeping.py      what stays of a run beside its row
    rehearsal.py    what is done, and whether everything can be built, before anything runs
    tables.py       mean and standard deviation over seeds, as Markdown and on the console
    comparison.py   whether the difference of two models is more than chance
    papers/         tables of papers: which jobs their cells are read off, and the published numbers beside them
"""

from anomalib_pack.sweep.pipeline import Sweep

__all__ = ["Sweep"]
