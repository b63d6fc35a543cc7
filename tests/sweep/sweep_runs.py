"""Configurations and runs of sweeps."""

import yaml

from anomalib_pack.sweep import Sweep
from anomalib_pack.sweep.results import read_rows

ADJUSTABLE = "sweep_models.Adjustable"
TINY = {
    "class_path": "tiny_model.TinyModel",
    "init_args": {"evaluator": {"class_path": "anomalib_pack.metrics.GroupEvaluator"}},
}


def sweep(folder, config, *options):
    """Run the pipeline on a configuration.

    Returns:
        Exit status, folder of the results, and rows by model, data and seed.
    """
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    status = 0
    try:
        Sweep().run(Sweep.get_parser().parse_args(["--config", str(path), *map(str, options)]))
    except SystemExit as stop:
        status = stop.code
    results = max((folder / "runs" / "sweep").iterdir())
    rows = {(row["model"], row["row"], int(row["seed"])): row for row in read_rows(results / "results.csv")}
    return status, results, rows


def adjustable(name=None, trainer=None, **init_args):
    """An entry of `models`."""
    entry = {"class_path": ADJUSTABLE, "init_args": init_args, "trainer": trainer or {}}
    return entry | ({"name": name} if name else {})
