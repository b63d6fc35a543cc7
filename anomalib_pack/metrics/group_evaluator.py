"""Anomalib's evaluation, overall and per group of test images.

Each metric is computed by its own class on fields of the test batches that are stored once::

    on_test_batch_end   fields of the batch -> store
    on_test_epoch_end   for overall and each group, for each metric: fresh copy, update with the subset, compute, log
    teardown            print the table, which thus comes after Lightning's
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

import torch
from anomalib.data import Batch, MVTecLOCO
from anomalib.metrics import AUROC, AnomalibMetric, F1Max, F1Score
from anomalib.metrics.evaluator import Evaluator
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch import distributed as dist

from anomalib_pack.files import replace_file
from anomalib_pack.metrics import image, pixel
from anomalib_pack.metrics.roc import RocCorners
from anomalib_pack.metrics.samples import belongs, copied, names_group, select, unpadded_count

EVERY_GROUP = ""  # Group of the images that belong to every group.

# The metrics whose mean is mAD: MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection, Sec. 4.1.
MAD_METRICS = (
    *("image_AUROC", "image_AP", "image_F1Max"),
    *("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO"),
)


def default_test_metrics() -> list[AnomalibMetric]:
    """AUROC, AP, F1-max and F1 score of images and pixels, and the pixel AUPRO.

    Pixel metrics are left out for data without masks.
    """
    scores, maps = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    return [
        AUROC(fields=scores, prefix="image_"),
        image.AP(fields=scores, prefix="image_"),
        F1Max(fields=scores, prefix="image_"),
        F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
        pixel.AUROC(fields=maps, prefix="pixel_", strict=False),
        pixel.AP(fields=maps, prefix="pixel_", strict=False),
        pixel.F1Max(fields=maps, prefix="pixel_", strict=False),
        F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
        pixel.AUPRO(fields=maps, prefix="pixel_", strict=False),
    ]


class GroupEvaluator(Evaluator):
    """Evaluator that reports test metrics overall, per group of images, and as the unweighted mean over groups.

    Overall values have Anomalib's names (``image_AUROC``), those of groups and the mean a suffix
    (``image_AUROC_logical_anomalies``, ``image_AUROC_mean``). With groups, a table is printed and written to
    ``metrics.csv`` in the trainer's ``default_root_dir``. Several processes give the values of one: every image counts
    once.

    What does not exist is left out with a warning: a group without normal or without anomalous images; in a test set
    without normal ones the overall metrics of labels, without anomalous ones those of masks too.

    ``mAD`` is the unweighted mean of AUROC, AP and F1-max of images and pixels and the pixel AUPRO, by their names in
    ``default_test_metrics``; without one of them it is not reported.

    Args:
        val_metrics: Validation metrics, as in Anomalib's ``Evaluator``: of scores and maps, because labels and masks
            are predicted in tests only.
        test_metrics: Test metrics; None means :func:`default_test_metrics`.
        compute_on_cpu: Keep the stored fields in main memory; without effect with several devices, as in Anomalib.
        group_by: ``"group"`` uses the batch's field of that name, with one string per image: ``""`` for images that
            belong to every group, ``"pushpins/"`` for those of every group whose name starts so; batches without it
            have no groups. ``"folder"`` uses the name of the folder of
            anomalous images, which is the type of defect in MVTec AD; normal images belong to every group.

    Raises:
        ValueError: If ``group_by`` is neither of the two, two metrics have one name, or a validation metric needs
            labels or masks that are predicted.

    Example:
        >>> from anomalib.models import Patchcore
        >>> from anomalib_pack.metrics import GroupEvaluator
        >>> model = Patchcore(pre_trained=False, evaluator=GroupEvaluator(group_by="folder"))
    """

    def __init__(
        self,
        val_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        test_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        compute_on_cpu: bool = True,
        group_by: Literal["group", "folder"] = "group",
    ) -> None:
        if group_by not in {"group", "folder"}:
            msg = f"group_by must be 'group' or 'folder', got {group_by!r}."
            raise ValueError(msg)
        super().__init__(val_metrics, compute_on_cpu=compute_on_cpu)
        _check_fields(self.val_metrics)
        # A plain list in place of the module list: AUPRO's buffer would enter checkpoints, which then could be loaded
        # with this evaluator only.
        del self.test_metrics
        self.test_metrics = self.validate_metrics(default_test_metrics() if test_metrics is None else test_metrics)
        for kind, metrics in (("val_metrics", self.val_metrics), ("test_metrics", self.test_metrics)):
            _check_names(kind, [metric.name for metric in metrics])
        self.group_by = group_by
        self._store: list[SimpleNamespace] = []
        self._table: Table | None = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run that was cut short."""
        del pl_module
        if type(trainer.datamodule) is MVTecLOCO:
            rank_zero_warn(
                "Anomalib's MVTecLOCO does not tell the groups of anomalies: metrics are reported for all images "
                "together. MVTecLoco, with small letters, reads the same folder and reports each group."
            )
        self._store.clear()
        self._table = None

    def on_test_batch_end(
        self,
        trainer: Trainer | None,
        pl_module: LightningModule | None,
        outputs: STEP_OUTPUT | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store what the metrics need of the batch."""
        if trainer is None:  # Anomalib's tiled ensemble computes the metrics itself, without a run
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            return
        count = unpadded_count(trainer.test_dataloaders, batch_idx, dataloader_idx)
        fields = {field for metric in self.test_metrics for field in metric.fields} | {"gt_label"}
        samples = copied(select(batch, fields, slice(count)), self._store_device(trainer, pl_module))
        samples.group = self._groups(batch)[:count]
        self._store.append(samples)

    def _store_device(self, trainer: Trainer, pl_module: LightningModule) -> torch.device:
        """Where fields are kept; collective operations may need them on the accelerator."""
        return torch.device("cpu") if self.compute_on_cpu and trainer.world_size == 1 else pl_module.device

    def _groups(self, batch: Batch) -> list[str]:
        """Group of each image of a batch."""
        if self.group_by == "group" and getattr(batch, "group", None) is not None:
            return batch.group
        if self.group_by == "folder" and batch.image_path is not None and batch.gt_label is not None:
            return [
                Path(path).parent.name if anomalous else EVERY_GROUP
                for path, anomalous in zip(batch.image_path, batch.gt_label.tolist(), strict=True)
            ]
        return [EVERY_GROUP] * batch.batch_size

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log, print and write the metrics."""
        labels = self._labels(trainer)
        groups = [group for group in sorted(filter(names_group, labels)) if _has_both_labels(group, labels)]
        device = self._store_device(trainer, pl_module)
        existing = _existing(self.test_metrics, set().union(*labels.values()))
        rows = {group: with_mad(self._values(existing, group, device)) for group in ("", *groups)}
        self._store.clear()
        if groups:
            rows["mean"] = mean_row([rows[group] for group in groups])
        self._log(rows, trainer)
        if groups and trainer.is_global_zero:
            self._table = rich_table(rows)
            write_csv(rows, Path(trainer.default_root_dir) / "metrics.csv")

    def _labels(self, trainer: Trainer) -> dict[str, set[bool]]:
        """Labels that the images of each group have, counting the images of all processes."""
        labels: dict[str, set[bool]] = {}
        for samples in self._store:
            for index, group in enumerate(samples.group):
                # Without ground truth nothing is known to be missing.
                known = {True, False} if samples.gt_label is None else {bool(samples.gt_label[index])}
                labels.setdefault(group, set()).update(known)
        shares = [labels]
        if trainer.world_size > 1:
            shares = [{}] * trainer.world_size
            dist.all_gather_object(shares, labels)
        groups = {group for share in shares for group in share}
        return {group: set().union(*(share.get(group, set()) for share in shares)) for group in groups}

    def _values(self, metrics: Sequence[AnomalibMetric], group: str, device: torch.device) -> dict[str, float]:
        """Values of the metrics whose fields exist, for a group or for all images."""
        values = {}
        curves: dict[tuple[str, ...], RocCorners] = {}
        for metric in metrics:
            fields = tuple(metric.fields)
            if isinstance(metric, pixel.PixelMetric) and fields in curves:
                # Sorting the pixels is nearly all the work, and need not be done for each metric.
                values[metric.name] = metric.value(curves[fields])
                continue
            fresh = self._updated(metric.clone().to(device), group)
            value = fresh.compute()
            if value is not None:
                values[metric.name] = float(value)
                if isinstance(fresh, pixel.PixelMetric):
                    curves[fields] = fresh.curve
        return values

    def _updated(self, metric: AnomalibMetric, group: str) -> AnomalibMetric:
        """The metric, updated with the samples of a group."""
        members = [_members(samples, group) for samples in self._store]
        updates = [index for index, mask in enumerate(members) if mask.any()]
        # A process without images of the group has to take part in the synchronisation.
        for index in updates or [0]:
            samples, mask = self._store[index], members[index]
            metric.update(samples if mask.all() else select(samples, metric.fields, mask))
        return metric

    def _log(self, rows: dict[str, dict[str, float]], trainer: Trainer) -> None:
        for group, row in rows.items():
            for name, value in row.items():
                key = f"{name}_{group}" if group else name
                # All processes have the same value: averaging changes nothing, but Lightning asks for it.
                self.log(key, value, sync_dist=True)
                if trainer.barebones:  # Logging is off, and Anomalib reads the results here.
                    trainer.callback_metrics[key] = trainer.logged_metrics[key] = torch.tensor(value)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the table of a test run."""
        del trainer, pl_module, stage
        if self._table is not None:
            Console().print(self._table)
            self._table = None


def _check_fields(val_metrics: Iterable[AnomalibMetric]) -> None:
    for metric in val_metrics:
        predicted = [field for field in metric.fields if field in {"pred_label", "pred_mask"}]
        if predicted:
            msg = (
                f"val_metrics must not need {' and '.join(predicted)}, as {metric.name} does: labels and masks are "
                "predicted in tests only, with the thresholds that a validation finds. Use pred_score and anomaly_map, "
                "e.g. AUROC or F1Max, or make it a test metric."
            )
            raise ValueError(msg)


def _check_names(argument: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = (
            f"{argument} must have different names, or the last of two would replace the first, got "
            f"{', '.join(twice)} twice. Give one of them another `prefix`."
        )
        raise ValueError(msg)


def _has_both_labels(group: str, labels: dict[str, set[bool]]) -> bool:
    missing = _missing_labels(set().union(*(found for name, found in labels.items() if belongs(name, group))))
    for kind in missing:
        rank_zero_warn(f"Group {group!r} has no {kind} test images: its metrics do not exist and are left out.")
    return not missing


def _existing(metrics: Sequence[AnomalibMetric], labels: set[bool]) -> list[AnomalibMetric]:
    """The metrics that exist for test images with these labels.

    Labels of one kind have no ranking. Masks of anomalous images alone still have normal pixels.
    """
    existing = list(metrics)
    for kind in _missing_labels(labels):
        truths = {"gt_label", "gt_mask"} if kind == "anomalous" else {"gt_label"}
        left_out = [metric.name for metric in existing if truths.intersection(metric.fields)]
        existing = [metric for metric in existing if metric.name not in left_out]
        rank_zero_warn(f"There are no {kind} test images: {', '.join(left_out)} do not exist and are left out.")
    return existing


def _missing_labels(labels: set[bool]) -> list[str]:
    return [kind for label, kind in ((False, "normal"), (True, "anomalous")) if label not in labels]


def _members(samples: SimpleNamespace, group: str) -> Tensor:
    """Mask of shape (B,): which samples belong to the group; to the group "" belong all."""
    return torch.tensor([belongs(name, group) for name in samples.group], dtype=torch.bool)


def with_mad(row: dict[str, float]) -> dict[str, float]:
    """The row and ``mAD``, the unweighted mean of ``MAD_METRICS``; without it if one of them is missing."""
    if not row.keys() >= set(MAD_METRICS):
        return row
    return row | {"mAD": fmean(row[name] for name in MAD_METRICS)}


def mean_row(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Unweighted mean of each metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def rich_table(rows: dict[str, dict[str, float]]) -> Table:
    """Table for the console, as papers have it: groups down, metrics across, the mean last, in percent.

    It has no overall row, which papers do not have either; Lightning prints those values.
    """
    names = list(rows[""])
    # Headers of two lines and one space between columns, so that ten values and MVTec AD's categories fit in 80
    # columns. Longer groups wrap.
    headers = [Column(name.replace("_", "\n", 1), justify="right", vertical="bottom", no_wrap=True) for name in names]
    table = Table(
        Column("group", vertical="bottom"),
        *headers,
        title="Test metrics per group, in %",
        box=box.HORIZONTALS,
        padding=0,
        pad_edge=False,
    )
    groups = [group for group in rows if group]
    for group in groups:
        values = (f"{100 * rows[group][name]:.1f}" if name in rows[group] else "" for name in names)
        table.add_row(group.replace("_", " "), *values, end_section=group == groups[-2])
    return table


def write_csv(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Write the table with the overall row first; metrics that do not exist are empty.

    If it cannot be written, e.g. on a full disk, a warning says so: the metrics are printed all the same.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["group", *rows[""]])
    writer.writeheader()
    writer.writerows({"group": group or "overall"} | row for group, row in rows.items())
    try:
        replace_file(path, text.getvalue().encode())
    except OSError as error:
        rank_zero_warn(error.strerror)
