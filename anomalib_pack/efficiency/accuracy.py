"""A metric of each model, read from the results of another run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

MODEL_COLUMNS = ("model", "model.class_path")  # any table; the one that `anomalib benchmark` writes


def read_accuracy(path: Path, metric: str) -> dict[str, float]:
    """Read the mean of a metric over all rows of a model, e.g. over categories and seeds.

    Args:
        path: CSV file with a column `model` or `model.class_path` and one for the metric.
        metric: Name of the column.

    Returns:
        Mean by name of model; of a dotted class path the last part is the name.

    Raises:
        ValueError: If the file or a column is missing; the message says which columns there are.
    """
    if not path.is_file():
        msg = f"results must be a CSV file, got {path}, which is not there."
        raise ValueError(msg)
    table = pd.read_csv(path)
    model_column = next((column for column in MODEL_COLUMNS if column in table), None)
    if model_column is None or metric not in table:
        msg = f"{path} needs a column {' or '.join(MODEL_COLUMNS)} and {metric}, but has {', '.join(table.columns)}."
        raise ValueError(msg)
    names = table[model_column].str.rsplit(".", n=1).str[-1]
    return table.groupby(names)[metric].mean().dropna().to_dict()
