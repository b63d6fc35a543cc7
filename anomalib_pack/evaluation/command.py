"""The command."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from anomalib_pack.data import MultiCategory
from anomalib_pack.evaluation.images import list_images
from anomalib_pack.evaluation.layout import category_name
from anomalib_pack.evaluation.results import evaluate
from anomalib_pack.files import replace_file
from anomalib_pack.metrics.tables import mean_row, rich_table, write_csv


def run(arguments: Sequence[str]) -> int:
    """Evaluate the maps that are described by the arguments of the command.

    Returns:
        Exit status: 0.

    Raises:
        OSError: If a file cannot be read or written; the message names it.
        ValueError: If a map is missing or is not as it should be, which the message names, or there is no ground truth.
    """
    parser = ArgumentParser(
        prog="python -m anomalib_pack evaluate",
        description="Compute metrics of anomaly maps that any toolbox has written: "
        "DIR/<category>/test/<group>/<image>.tiff, of the size of the image.",
    )
    parser.add_argument("--maps", type=Path, required=True, metavar="DIR", help="folder of the maps")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the results")
    parser.add_argument(
        "--categories",
        type=list[str] | Literal["all"] | None,
        help="'all' or a list, in place of --data.category: each of them, and their mean",
    )
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    settings = parser.parse_args(arguments)
    if settings.categories is not None:
        settings.data = _of_categories(settings.data, settings.categories)
    evaluate_maps(settings.maps, parser.instantiate_classes(settings).data, settings.out)
    return 0


def _of_categories(data: Namespace, categories: list[str] | str) -> Namespace:
    """Description of the datamodule of several categories, from that of a datamodule of one."""
    given = {name: value for name, value in vars(data.get("init_args", Namespace())).items() if name != "category"}
    own = inspect.signature(MultiCategory).parameters
    arguments = {name: value for name, value in given.items() if name in own}
    others = {name: value for name, value in given.items() if name not in own}
    dataset = data.class_path.rpartition(".")[-1]
    init_args = Namespace(dataset=dataset, categories=categories, dataset_args=others, **arguments)
    return Namespace(class_path="anomalib_pack.data.MultiCategory", init_args=init_args)


def evaluate_maps(folder: Path, datamodule: AnomalibDataModule, out: Path) -> None:
    """Evaluate maps, print tables and write the results.

    Args:
        folder: Folder of the maps.
        datamodule: Tells the test images and their ground truth; one of several categories is evaluated category by
            category. Nothing is downloaded.
        out: Folder that gets ``<category>_metrics.json``, in the format of the published evaluations, and
            ``<category>_metrics.csv``; with several categories also their mean, in ``metrics.csv``.
    """
    joined = isinstance(datamodule, MultiCategory)
    parts = datamodule.datamodules() if joined else {category_name(datamodule): datamodule}
    root = getattr(datamodule, "root", None)
    # What is missing in the last category is to be known before work on the first.
    mapped = [list_images(category, part, root, folder) for category, part in parts.items()]
    rows, has_groups = {}, False
    for images in mapped:
        result = evaluate(images)
        replace_file(out / f"{images.category}_metrics.json", json.dumps(result.published, indent=4).encode())
        write_csv(result.rows, out / f"{images.category}_metrics.csv")
        has_groups = "mean" in result.rows
        if has_groups:
            _print(result.rows, f"Groups of {images.category}, in %")
        rows[images.category] = result.rows.get("mean", result.rows[""])
    rows["mean"] = mean_row(list(rows.values()))
    if joined or not has_groups:
        _print(rows, "Categories, in %")
    if joined:
        write_csv(rows, out / "metrics.csv")


def _print(rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    table = rich_table(rows)
    table.title = title
    Console().print(table)
