"""What is read of runs and sweeps."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anomalib_pack.data.image_files import names
from anomalib_pack.records.rows import PREDICTION_COLUMNS
from anomalib_pack.records.write_records import PREFIXES
from anomalib_pack.sweep.job import RESULTS
from anomalib_pack.sweep.results import rows_by_job

TESTED, PREDICTED = (f"{PREFIXES[stage]}predictions.csv" for stage in ("test", "predict"))
METRICS = "test_metrics.json"
METRIC_PREFIXES = ("image_", "pixel_", "mAD")
CHECKPOINTS = ("weights/lightning/model.ckpt", "weights/model.ckpt")
WRITTEN_BY = (
    "A test writes it: the models of anomalib_pack by default, others with "
    "`--trainer.callbacks+=anomalib_pack.callbacks.WriteRecords`."
)


@dataclass(frozen=True)
class Image:
    """A row of the records.

    Attributes:
        path: Of the image file, as the run had it.
        label: 0 or 1; None where it is unknown.
        predicted: Likewise, what the run decided.
        raw_score: None if it is not a number.
        score: The normalised one.
        picture: Of the visualizer, or None.
    """

    path: str
    category: str
    group: str
    label: int | None
    predicted: int | None
    raw_score: float | None
    score: float | None
    explanation: str
    picture: Path | None


@dataclass(frozen=True)
class Run:
    """What one run recorded.

    Attributes:
        name: Unique in a report.
        folder: Of the records.
        metrics: All that the test logged; none if it was stopped before.
        images: In the order of the data set.
        raw_threshold: Above it an image is anomalous; None if the run had none.
        threshold: The same in normalised scores.
        checkpoint: Of the model, if it lies in the folder.
    """

    name: str
    folder: Path
    metrics: dict[str, float]
    images: list[Image]
    raw_threshold: float | None
    threshold: float | None
    checkpoint: Path | None

    @property
    def groups(self) -> list[str]:
        """Names that metrics of parts of the images end with."""
        parts = {(image.category, image.group) for image in self.images}
        found = {name for category, group in parts for name in (group, category, f"{category}/{group}")}
        return sorted(found - {"", "/"})


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, and those that the sweeps among the folders have kept the records of.

    Raises:
        OSError: If a folder or file is not there or cannot be read; the message says what to do.
        ValueError: If a file is none of records; the message names it.
    """
    found = [run for folder in {each.resolve(): _lasting(each) for each in folders}.values() for run in _read(folder)]
    shown = _names([run.folder.resolve() for run in found])
    named = [run if run.name else replace(run, name=name) for run, name in zip(found, shown, strict=True)]
    times = Counter(run.name for run in named)
    return [run if times[run.name] == 1 else replace(run, name=f"{run.name} ({run.folder})") for run in named]


def _lasting(folder: Path) -> Path:
    """What a link such as `latest` leads to now; the next run moves the link, and a report would name another model."""
    if not folder.is_symlink():
        return folder
    real = folder.resolve()
    beside = folder.with_name(real.name)  # shorter, and as it was given
    return beside if beside.resolve() == real else real


def _read(folder: Path) -> Iterator[Run]:
    if not folder.is_dir():
        msg = (
            f"There is no folder {folder}. Give the folder of a test run, e.g. "
            "results/Ulsad/SyntheticLoco/tray/latest, or of a sweep."
        )
        raise FileNotFoundError(msg)
    if (folder / RESULTS).is_file():
        yield from _read_sweep(folder)
        return
    records = next((folder / name for name in (TESTED, PREDICTED) if (folder / name).is_file()), None)
    if records is None:
        inside = sorted(path.parent for path in folder.glob(f"*/{TESTED}"))
        remedy = f"Do you mean {names(inside, 3)}?" if inside else WRITTEN_BY
        msg = f"{folder} is no run: it has no {TESTED}. {remedy}"
        raise FileNotFoundError(msg)
    yield read_run(records)


def _read_sweep(folder: Path) -> Iterator[Run]:
    """The jobs whose records the sweep has kept; metrics are in its results where they are not beside the records."""
    kept = {job: folder / "predictions" / job / TESTED for job in rows_by_job(folder / RESULTS)}
    kept = {job: records for job, records in kept.items() if records.is_file()}
    if not kept:
        msg = f"The sweep {folder} has no predictions/<job>/{TESTED}: no job has ended well. Run it again."
        raise FileNotFoundError(msg)
    for job, row in rows_by_job(folder / RESULTS).items():
        if job in kept:
            place = f"{row['dataset']} {row['row']}".strip()
            run = read_run(kept[job], f"{row['model']}, {place}, seed {row['seed']}")
            metrics = {name: float(value) for name, value in row.items() if value and name.startswith(METRIC_PREFIXES)}
            yield run if run.metrics else replace(run, metrics=metrics)


def read_run(records: Path, name: str = "") -> Run:
    """Read a run.

    Args:
        records: File of its images.
        name: In the report; later, if it is empty.
    """
    folder = records.parent
    rows = list(_rows(records))
    if not rows:
        msg = f"{records} has no images: the run was stopped before the first. Test again."
        raise ValueError(msg)
    thresholds = {(row["raw_threshold"], row["threshold"]) for row in rows}
    if len(thresholds) > 1:
        msg = f"{records} has {len(thresholds)} different thresholds; a run has one."
        raise ValueError(msg)
    ((raw_threshold, threshold),) = thresholds
    return Run(
        name=name,
        folder=folder,
        metrics=_read_metrics(folder / METRICS),
        images=[_image(row, folder, records) for row in rows],
        raw_threshold=_number(raw_threshold, records),
        threshold=_number(threshold, records),
        checkpoint=next((folder / path for path in CHECKPOINTS if (folder / path).is_file()), None),
    )


def _rows(records: Path) -> Iterator[dict[str, str]]:
    with records.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = [column for column in PREDICTION_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            msg = f"{records} is no file of records: it has no column {', '.join(missing)}. {WRITTEN_BY}"
            raise ValueError(msg)
        for row in reader:
            if None not in row.values():
                yield row
            elif next(reader, None) is not None:  # else the run was killed while it wrote the last one
                msg = f"{records} is damaged: line {reader.line_num - 1} has too few columns."
                raise ValueError(msg)


def _image(row: dict[str, str], folder: Path, records: Path) -> Image:
    return Image(
        path=row["image_path"],
        category=row["category"],
        group=row["group"],
        label=_label(row["gt_label"], records),
        predicted=_label(row["pred_label"], records),
        raw_score=_number(row["raw_score"], records),
        score=_number(row["pred_score"], records),
        explanation=row["explanation"],
        picture=folder / row["picture"] if row["picture"] else None,
    )


def _number(text: str, records: Path) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError as error:
        msg = f"{records} has {text!r} in place of a number."
        raise ValueError(msg) from error
    return value if math.isfinite(value) else None


def _label(text: str, records: Path) -> int | None:
    if text not in ("", "0", "1"):
        msg = f"{records} has the label {text!r}; 0, 1 or none is allowed."
        raise ValueError(msg)
    return int(text) if text else None


def _read_metrics(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        msg = f"{path} must have a number for each metric: {error}"
        raise ValueError(msg) from error


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names of folders: what differs, or of one the last four parts, e.g. ``Ulsad/SyntheticLoco/tray/v0``."""
    parts = [folder.parts for folder in folders]
    if len(set(parts)) == 1:
        return ["/".join(each[-4:]) for each in parts]
    first = min(_same(parts), min(map(len, parts)) - 1)
    last = _same([each[:first:-1] for each in parts])  # of each, one part must be left
    return ["/".join(each[first : len(each) - last]) for each in parts]


def _same(parts: Sequence[Sequence[str]]) -> int:
    """How many parts at the beginning are the same."""
    columns = zip(*parts, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, parts)))
