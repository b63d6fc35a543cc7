"""Anomalib's evaluation, overall and per group of test images.

Each metric is computed by its own class on fields of the test batches that are stored once::

    on_test_batch_end   fields of the batch -> store; for metrics at the original size, the map before post-processing
    on_test_epoch_end   for overall and each group, for each metric: fresh copy, update with the subset, compute, log
    teardown            print the table, which thus comes after Lightning's
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import torch
from anomalib.data import Batch, MVTecLOCO
from anomalib.metrics import AUPIMO, AUPRO, AUROC, PIMO, AnomalibMetric, F1Max, F1Score
from anomalib.metrics.evaluator import Evaluator
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist

from anomalib_pack.metrics import image, pixel
from anomalib_pack.metrics.original_size import (
    ORIGINAL_FIELDS,
    KeepsRawMaps,
    NotWholeError,
    Original,
    Originals,
    check_whole_image,
)
from anomalib_pack.metrics.roc import RocCorners
from anomalib_pack.metrics.samples import belongs, copied, names_group, select, unpadded_count
from anomalib_pack.metrics.spro import LIMITS, image_auroc, published_result
from anomalib_pack.metrics.tables import mean_row, rich_table, with_mad, write_csv, write_or_warn

if TYPE_CHECKING:
    from anomalib_pack.region import WholeImage

EVERY_GROUP = ""  # Group of the images that belong to every group.


def default_test_metrics() -> list[AnomalibMetric]:
    """AUROC, AP, F1-max and F1 score of images and pixels, the pixel AUPRO, and AUC-sPRO.

    Pixel metrics are left out for data without masks, and AUC-sPRO for data that does not tell defects apart, as MVTec
    LOCO does.
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
        pixel.SPRO(prefix="pixel_", strict=False),
    ]


class GroupEvaluator(Evaluator):
    """Evaluator that reports test metrics overall, per group of images, and as the unweighted mean over groups.

    Overall values have Anomalib's names (``image_AUROC``), those of groups and the mean a suffix
    (``image_AUROC_logical_anomalies``, ``image_AUROC_mean``). With groups, a table is printed and written to
    ``metrics.csv`` in the trainer's ``default_root_dir``. Several processes give the values of one: every image counts
    once.

    What does not exist is left out with a warning: a group without normal or without anomalous images; in a test set
    without normal ones the overall metrics of labels, without anomalous ones those of masks too.

    :class:`pixel.SPRO` is computed at the size of the image files, because a saturation area counts their pixels. With
    it and MVTec LOCO's groups, ``<category>_metrics.json`` is written beside the table in the format of the published
    evaluation, where the score of an image is the maximum of its map at that size. Without ``strict`` it is left out
    for data that does not tell defects, and with a warning where ``defects_config.json`` is missing or the model does
    not see whole images.

    Where a model of the pack has a region, the pixels outside do not count: a defect is its part inside.

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
        map_size: Size of the maps and masks of test metrics. ``"input"``: that of the model's input, as in batches.
            ``"original"``: that of the image files. Maps are then the model's own, before they are normalised, resized
            bilinearly, and masks those of the files, which the ``samples`` of the data set tell.

    Raises:
        ValueError: If ``group_by`` or ``map_size`` is none of those, two metrics have one name, or a validation metric
            needs labels or masks that are predicted. In a test at the original size, if the data set has no ``samples``
            or the maps do not show whole images, because the pre-processor crops.

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
        map_size: Literal["input", "original"] = "input",
    ) -> None:
        _check_choice("group_by", group_by, ("group", "folder"))
        _check_choice("map_size", map_size, ("input", "original"))
        super().__init__(val_metrics, compute_on_cpu=compute_on_cpu)
        _check_fields(self.val_metrics)
        # A plain list in place of the module list: AUPRO's buffer would enter checkpoints, which then could be loaded
        # with this evaluator only.
        del self.test_metrics
        self.test_metrics = self.validate_metrics(default_test_metrics() if test_metrics is None else test_metrics)
        for kind, metrics in (("val_metrics", self.val_metrics), ("test_metrics", self.test_metrics)):
            _check_names(kind, [metric.name for metric in metrics])
        self.group_by = group_by
        self.map_size = map_size
        self._metrics: list[AnomalibMetric] = []  # those of test_metrics that the running test computes
        self._originals: list[Originals] = []  # of each loader, if there are metrics at the original size
        self._raw = KeepsRawMaps()
        self._post_processor: PostProcessor | None = None
        self._min_area = 0  # of a defect in predicted masks at the original size
        self._store: list[SimpleNamespace] = []
        self._areas: dict[str, dict[float, float]] = {}  # AUC-sPRO of all limits by group
        self._table: Table | None = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run that was cut short, and find the files of the images if they are needed."""
        if type(trainer.datamodule) is MVTecLOCO:
            rank_zero_warn(
                "Anomalib's MVTecLOCO does not tell the groups of anomalies: metrics are reported for all images "
                "together. MVTecLoco, with small letters, reads the same folder and reports each group."
            )
        self._store.clear()
        self._areas.clear()
        self._table = None
        object.__setattr__(self, "_region", _region_of(pl_module))  # as the post-processor below
        if self._region.is_part:
            _check_regions(self.test_metrics)
        self._find_originals(trainer, pl_module)

    def _find_originals(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the metrics of this test, and find the files of images if one is computed at the original size."""
        loaders = trainer.test_dataloaders
        datasets = [getattr(each, "dataset", None) for each in (loaders if isinstance(loaders, list) else [loaders])]
        self._metrics = [
            metric
            for metric in self.test_metrics
            if "defects" not in metric.fields or self._can_count_defects(metric, pl_module, datasets)
        ]
        self._originals = []
        if any(map(self._is_at_original_size, self._metrics)):
            self._originals = [Originals(dataset) for dataset in datasets]
            for dataset in datasets:
                check_whole_image(pl_module, dataset)
            # Around nn.Module, for which it would be a part: its thresholds would enter checkpoints twice.
            object.__setattr__(self, "_post_processor", getattr(pl_module, "post_processor", None))
            self._min_area = _min_area(trainer)
            # A new list, because the trainer is on its way through this one; in front of the post-processor.
            others = [callback for callback in trainer.callbacks if callback is not self._raw]
            trainer.callbacks = [self._raw, *others]

    def _can_count_defects(self, metric: AnomalibMetric, pl_module: LightningModule, datasets: Sequence) -> bool:
        """Whether a metric of defects can be computed; it is an error if it cannot, but must."""
        has_defects = all(getattr(dataset, "defects", None) is not None for dataset in datasets)
        if not has_defects and not metric.strict:
            return False
        try:
            if not has_defects:
                msg = (
                    f"{metric.name} needs a data set that tells the defects of its images, as MVTecLoco and "
                    "SyntheticLoco do."
                )
                raise ValueError(msg)
            for dataset in datasets:
                check_whole_image(pl_module, dataset)
                Originals(dataset).check_defects()
        except (FileNotFoundError, NotWholeError) as error:
            if metric.strict:
                raise
            rank_zero_warn(f"{metric.name} is left out. {error}")
            return False
        return True

    def _is_at_original_size(self, metric: AnomalibMetric) -> bool:
        fields = ORIGINAL_FIELDS if self.map_size == "original" else ("defects",)
        return not set(fields).isdisjoint(metric.fields)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the validation metrics, with the pixels that count."""
        region = _region_of(pl_module)
        if not region.is_part:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            return
        _check_regions(self.val_metrics)
        for metric in self.val_metrics:
            metric.update(_counted(metric, select(batch, metric.fields, slice(None)), region))

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
            # It asks each metric for a number, and has no data set that could tell the defects.
            self.test_metrics = [each for each in self.test_metrics if each.strict or "defects" not in each.fields]
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            return
        if self._originals and self._raw.maps is None:
            self._leave_out_maps()
        count = unpadded_count(trainer.test_dataloaders, batch_idx, dataloader_idx)
        fields = {field for metric in self._metrics for field in self._batch_fields(metric)} | {"gt_label"}
        device = self._store_device(trainer, pl_module)
        samples = copied(select(batch, fields, slice(count)), device)
        samples.group = self._groups(batch)[:count]
        if self._originals:
            samples.originals = self._read_originals(batch.image_path[:count], dataloader_idx, device)
        self._store.append(samples)

    def _leave_out_maps(self) -> None:
        """Leave out the metrics at the original size, as a model without maps asks for."""
        needed = [metric.name for metric in self._metrics if metric.strict and self._is_at_original_size(metric)]
        if needed:
            msg = f"{', '.join(needed)} at the original size need a model that gives anomaly maps."
            raise ValueError(msg)
        self._metrics = [metric for metric in self._metrics if not self._is_at_original_size(metric)]
        self._originals = []

    def _batch_fields(self, metric: AnomalibMetric) -> list[str]:
        """Fields of a metric that are taken from batches."""
        if not self._is_at_original_size(metric):
            return list(metric.fields)
        return [field for field in metric.fields if field not in ORIGINAL_FIELDS]

    def _read_originals(self, paths: Sequence[str], dataloader_idx: int, device: torch.device) -> list[Original]:
        """The images of a batch, with what the metrics at the original size need."""
        fields = {field for metric in self._metrics if self._is_at_original_size(metric) for field in metric.fields}
        files = self._originals[dataloader_idx]
        maps = self._raw.maps[: len(paths)].to(device)
        return [files.read(path, raw.clone(), fields) for path, raw in zip(paths, maps, strict=True)]

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
        existing = _existing(self._metrics, set().union(*labels.values()))
        rows = {group: with_mad(self._values(existing, group, device)) for group in ("", *groups)}
        results = self._published_results(trainer)
        self._store.clear()
        if groups:
            rows["mean"] = mean_row([rows[group] for group in groups])
        self._log(rows, trainer)
        if groups and trainer.is_global_zero:
            self._table = rich_table(rows)
            write_csv(rows, Path(trainer.default_root_dir) / "metrics.csv")
            for category, result in results.items():
                text = json.dumps(result, indent=4)
                write_or_warn(Path(trainer.default_root_dir) / f"{category}_metrics.json", text)

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
        values: dict[str, float] = {}
        for metric in metrics:
            if metric.name in values:
                continue
            if not isinstance(metric, pixel.PixelMetric):
                value = _computed(self._updated(metric.clone().to(device), group))
                values |= {} if value is None else {metric.name: float(value)}
                continue
            curve = self._curve(metric, group, device)
            if curve is not None:
                values |= {each.name: each.value(curve) for each in metrics if _curve_of(each) == _curve_of(metric)}
                if isinstance(metric, pixel.SPRO):
                    self._areas[group] = {limit: curve.aupro(limit) for limit in LIMITS}
        return {metric.name: values[metric.name] for metric in metrics if metric.name in values}

    def _curve(self, metric: pixel.PixelMetric, group: str, device: torch.device) -> RocCorners | None:
        """Curve of a metric; None if its fields do not exist."""
        if self._is_at_original_size(metric) and not (dist.is_available() and dist.is_initialized()):
            first = next(self._original_batches(metric, group))
            if all(getattr(first, field) is not None for field in metric.fields):
                return metric.curve_of(lambda: self._original_batches(metric, group))
        fresh = self._updated(metric.clone().to(device), group)
        if _computed(fresh) is None:
            return None
        fresh.reset()  # lets go of the pixels; as a reference cycle it would keep them for a while
        return fresh.curve

    def _updated(self, metric: AnomalibMetric, group: str) -> AnomalibMetric:
        """The metric, updated with the samples of a group."""
        batches = self._original_batches if self._is_at_original_size(metric) else self._input_batches
        for batch in batches(metric, group):
            metric.update(batch)
        return metric

    def _input_batches(self, metric: AnomalibMetric, group: str) -> Iterator[SimpleNamespace]:
        members = [_members(samples, group) for samples in self._store]
        updates = [index for index, mask in enumerate(members) if mask.any()]
        # A process without images of the group has to take part in the synchronisation.
        for index in updates or [0]:
            samples, mask = self._store[index], members[index]
            yield _counted(metric, samples if mask.all() else select(samples, metric.fields, mask), self._region)

    def _original_batches(self, metric: AnomalibMetric, group: str) -> Iterator[SimpleNamespace]:
        """One image at a time, because sizes differ and maps are large."""
        chosen = [
            (samples, index)
            for samples in self._store
            for index in _members(samples, group).nonzero().flatten().tolist()
        ]
        for samples, index in chosen:
            yield self._original_batch(metric, samples, slice(index, index + 1))
        if not chosen:  # as above
            empty = self._original_batch(metric, self._store[0], slice(1))
            yield select(empty, metric.fields, slice(0))

    def _original_batch(self, metric: AnomalibMetric, samples: SimpleNamespace, which: slice) -> SimpleNamespace:
        batch = select(samples, self._batch_fields(metric), which)
        original = samples.originals[which][0]
        at_original = original.batch(metric.fields, self._post_processor, self._min_area)
        return _counted(metric, SimpleNamespace(**vars(batch), **vars(at_original)), self._region)

    def _published_results(self, trainer: Trainer) -> dict[str, dict]:
        """Results of MVTec LOCO's categories in the format of the published evaluation, by category."""
        if not self._areas:
            return {}
        images = [
            (group, bool(label), float(original.anomaly_map().max()))
            for samples in self._store
            for group, label, original in zip(samples.group, samples.gt_label, samples.originals, strict=True)
        ]
        if trainer.world_size > 1:
            shares = [[]] * trainer.world_size
            dist.all_gather_object(shares, images)
            images = [image for share in shares for image in share]
        localization, classification = {}, {}
        for name, areas in self._areas.items():
            category, _, group = name.rpartition("/")
            category = category or self._originals[0].dataset.category
            if group and category:
                members = [(label, score) for other, label, score in images if belongs(other, name)]
                labels, scores = zip(*members, strict=True)
                localization.setdefault(category, {})[group] = areas
                classification.setdefault(category, {})[group] = image_auroc(torch.tensor(scores), labels)
        return {name: published_result(areas, classification[name]) for name, areas in localization.items()}

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
        del pl_module, stage
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self._raw]
        if self._table is not None:
            Console().print(self._table)
            self._table = None


def _min_area(trainer: Trainer) -> int:
    from anomalib_pack.records import WriteRecords  # noqa: PLC0415  # which needs this module

    return max((each.settings.min_area for each in trainer.callbacks if isinstance(each, WriteRecords)), default=0)


def _region_of(pl_module: LightningModule) -> "WholeImage":
    from anomalib_pack.region import region_of  # noqa: PLC0415  # it needs data sets, and they need metrics

    return region_of(pl_module)


def _check_regions(metrics: Iterable[AnomalibMetric]) -> None:
    """Refuse metrics that would count the pixels outside."""
    whole = [metric.name for metric in metrics if isinstance(metric, AUPRO | AUPIMO | PIMO)]
    if whole:
        msg = (
            f"Anomalib's {', '.join(whole)} cannot leave out the pixels outside a model's region: take "
            "anomalib_pack.metrics.pixel.AUPRO, or one without connected regions."
        )
        raise ValueError(msg)


def _counted(metric: AnomalibMetric, batch: SimpleNamespace, region: "WholeImage") -> SimpleNamespace:
    """What a metric sees of a batch, where pixels outside a region do not count."""
    maps = getattr(batch, "anomaly_map", None)
    if not region.is_part or not isinstance(metric, pixel.CountsInside) or maps is None:
        return region.part_of(batch)
    return SimpleNamespace(**vars(batch), inside=region.inside(maps.shape[-2:], maps.device))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        msg = f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}."
        raise ValueError(msg)


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


def _computed(metric: AnomalibMetric) -> Tensor | None:
    """Value of a metric; None if its fields do not exist, of which torchmetrics would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before", UserWarning)
        return metric.compute()


def _curve_of(metric: AnomalibMetric) -> tuple | None:
    """What tells the curve of a metric from others; sorting the pixels for one is nearly all the work."""
    return (*metric.fields, metric.split) if isinstance(metric, pixel.PixelMetric) else None


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
        truths = {"gt_label", "gt_mask", "defects"} if kind == "anomalous" else {"gt_label"}
        left_out = [metric.name for metric in existing if truths.intersection(metric.fields)]
        existing = [metric for metric in existing if metric.name not in left_out]
        rank_zero_warn(f"There are no {kind} test images: {', '.join(left_out)} do not exist and are left out.")
    return existing


def _missing_labels(labels: set[bool]) -> list[str]:
    return [kind for label, kind in ((False, "normal"), (True, "anomalous")) if label not in labels]


def _members(samples: SimpleNamespace, group: str) -> Tensor:
    """Mask of shape (B,): which samples belong to the group; to the group "" belong all."""
    return torch.tensor([belongs(name, group) for name in samples.group], dtype=torch.bool)
