"""The records of one test or prediction."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, Batch, PredictDataset
from anomalib.data.datasets.base import AnomalibDataset
from lightning import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.utils.data.distributed import DistributedSampler

from anomalib_pack.data.image_files import read_header
from anomalib_pack.data.predict import PredictImages
from anomalib_pack.evaluation.layout import category_name
from anomalib_pack.files import replace_file
from anomalib_pack.metrics.original_size import NotWholeError, at_size, check_whole_image, predicted_masks
from anomalib_pack.pictures import output_folder, picture_of
from anomalib_pack.records.coco import Outlined, annotation_file
from anomalib_pack.records.defects import Defect, Regions, find_regions, outline, without_specks
from anomalib_pack.records.rows import (
    DEFECT_COLUMNS,
    PREDICTION_COLUMNS,
    defect_rows,
    group_of,
    known,
    labels,
    scores,
)
from anomalib_pack.records.table import Row, Table
from anomalib_pack.records.thresholds import image_thresholds

logger = logging.getLogger(__name__)

METRICS = "test_metrics.json"


class Record(NamedTuple):
    """What is known of an image.

    Attributes:
        place: Number of its data loader, and its own in the data set.
        prediction: Its row.
        defects: Rows of its defects.
        outlines: Those of the defects, if there is a COCO file.
    """

    place: tuple[int, int]
    prediction: Row
    defects: list[Row]
    outlines: list[NDArray[np.int32]]


class Found(NamedTuple):
    """Defects of an image, and their outlines if there is a COCO file."""

    defects: list[Defect]
    outlines: list[NDArray[np.int32]]


@dataclass(frozen=True)
class Settings:
    """Arguments of :class:`~anomalib_pack.records.WriteRecords`."""

    min_area: int
    pixel_size: float | None
    coco: Path | None
    json_lines: bool


class Recorder:
    """Sees each batch three times, and writes records of it.

    Args:
        trainer: That of the run.
        module: The model.
        prefix: What the files' names begin with.
        loaders: Data loaders of the run.
        settings: What the user has chosen.

    Raises:
        NotWholeError: If defects are asked for, and maps do not show whole images.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, prefix: str, loaders: Sequence[Any], settings: Settings
    ) -> None:
        self._settings = settings
        self._trainer = trainer
        self._loaders = loaders
        self._folder = Path(trainer.default_root_dir)
        self._post_processor = getattr(module, "post_processor", None)
        self._thresholds = image_thresholds(self._post_processor)
        self._categories = [_categories(trainer, getattr(loader, "dataset", None)) for loader in loaders]
        self._seen = [0] * len(loaders)  # images of each loader, in this process
        self._keeps_records = trainer.world_size > 1 or settings.coco is not None
        self._records: list[Record] = []  # of this process, if they are kept
        self._said = False
        self._raw_scores: Tensor | None = None
        self._raw_maps: Tensor | None = None
        self._gives_masks = False  # whether the model itself gives masks
        self._found: list[Found] = []  # in each image of a batch
        self._finds_defects = self._show_whole_images(module)
        self._tables = list(self._new_tables(prefix))
        self._add([])

    def _new_tables(self, prefix: str) -> Iterator[tuple[Table, Callable[[Record], list[Row]]]]:
        """Tables, and what tells the rows of an image."""
        for suffix in (".csv", ".jsonl") if self._settings.json_lines else (".csv",):
            yield self._table(f"{prefix}predictions{suffix}", PREDICTION_COLUMNS), lambda record: [record.prediction]
            if self._finds_defects:
                yield self._table(f"{prefix}defects{suffix}", DEFECT_COLUMNS), lambda record: record.defects

    def _table(self, name: str, columns: Sequence[str]) -> Table:
        """Table of this process: in the file itself on the first one."""
        path, rank = self._folder / name, self._trainer.global_rank
        return Table(path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path, columns)

    def _show_whole_images(self, module: LightningModule) -> bool:
        datasets = [getattr(loader, "dataset", None) for loader in self._loaders]
        try:
            for dataset in datasets:
                if isinstance(dataset, AnomalibDataset | PredictDataset | PredictImages):
                    check_whole_image(module, dataset)
        except (NotWholeError, OSError) as error:  # files of videos are no images
            if self._needs_defects:
                raise
            logger.warning("There are no records of defects. %s", error)
            return False
        return True

    @property
    def _needs_defects(self) -> bool:
        """Whether the user asks for something that needs them."""
        return self._settings.min_area > 0 or self._settings.coco is not None

    def take_raw(self, outputs: Batch, _dataloader_idx: int) -> None:
        """Keep scores and maps as the model gives them."""
        self._raw_scores = None if outputs.pred_score is None else outputs.pred_score.detach().clone()
        self._raw_maps = None
        if self._finds_defects and outputs.anomaly_map is not None:
            self._raw_maps = outputs.anomaly_map.detach().clone().float()
        self._gives_masks = outputs.pred_mask is not None

    def find_defects(self, outputs: Batch, _dataloader_idx: int) -> None:
        """Find the defects in the predicted masks, and drop what is too small to be one from masks and labels."""
        self._found = [Found([], []) for _ in range(outputs.batch_size)]
        paths = getattr(outputs, "image_path", None)  # videos have none
        if outputs.pred_mask is None or paths is None or self._raw_maps is None:
            return
        masks = outputs.pred_mask.clone() if self._settings.min_area else outputs.pred_mask
        for index in masks.flatten(1).any(dim=1).nonzero().flatten().tolist():
            mask = _flat(masks[index])
            size = self._file_size(paths[index])
            if size is None:
                continue
            regions = self._regions(size, _flat(self._raw_maps[index]), mask)
            self._found[index] = self._outlined(regions)
            if self._settings.min_area:
                mask.copy_(torch.from_numpy(without_specks(mask.cpu().numpy(), regions.labels > 0)))
        if self._settings.min_area:
            outputs.pred_mask = masks
            self._drop_labels(outputs)

    def _drop_labels(self, outputs: Batch) -> None:
        """Let images without a defect be normal."""
        if outputs.pred_label is not None:
            have_defects = torch.tensor([bool(found.defects) for found in self._found])
            outputs.pred_label = outputs.pred_label & have_defects.to(outputs.pred_label.device)

    def _file_size(self, image_path: str) -> tuple[int, int] | None:
        """Height and width; None, with a warning, if there is no file of the image."""
        try:
            return read_header(image_path).size
        except OSError as error:
            if self._needs_defects:
                raise
            self._say(f"There is no record of its defects. {error}")
            return None

    def _regions(self, size: tuple[int, int], raw_map: Tensor, mask: Tensor) -> Regions:
        """Defects of an image at the size of its file."""
        raw_map = at_size(raw_map, size)
        if self._gives_masks:
            mask = at_size(mask.float(), size) >= 0.5
        else:
            mask = predicted_masks(raw_map.unsqueeze(0), self._post_processor).squeeze(0)
        arrays = mask.cpu().numpy(), raw_map.cpu().numpy()
        return find_regions(*arrays, self._settings.min_area, self._settings.pixel_size)

    def _outlined(self, regions: Regions) -> Found:
        numbered = enumerate(regions.defects if self._settings.coco else [], start=1)
        return Found(regions.defects, [outline(regions.labels, number, defect) for number, defect in numbered])

    def write(self, outputs: Batch, dataloader_idx: int) -> None:
        """Write what is known of a batch."""
        places = self._places(outputs.batch_size, dataloader_idx)
        predictions = self._predictions(outputs, self._categories[dataloader_idx])
        images = zip(places, predictions, self._found, strict=True)
        records = [
            Record(place, prediction, defect_rows(prediction, found.defects), found.outlines)
            for place, prediction, found in images
            if place is not None
        ]
        self._add(records)

    def _places(self, count: int, dataloader_idx: int) -> list[tuple[int, int] | None]:
        """Place of each image; None for one that ``DistributedSampler`` repeats to give each process equally many."""
        first = self._seen[dataloader_idx]
        self._seen[dataloader_idx] += count
        sampler = getattr(self._loaders[dataloader_idx], "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return [(dataloader_idx, index) for index in range(first, first + count)]
        indices = [index * sampler.num_replicas + sampler.rank for index in range(first, first + count)]
        return [(dataloader_idx, index) if index < len(sampler.dataset) else None for index in indices]

    def _predictions(self, outputs: Batch, category_of: Callable[[str], str]) -> list[Row]:
        count = outputs.batch_size
        paths = getattr(outputs, "image_path", None) or [""] * count
        truth = labels(outputs.gt_label, count)
        categories = [category_of(path) for path in paths]
        given = getattr(outputs, "group", None) or [""] * count
        columns = {
            "image_path": paths,
            "category": categories,
            "group": [
                "" if label is None else group_of(path, group, category)
                for path, group, category, label in zip(paths, given, categories, truth, strict=True)
            ],
            "gt_label": truth,
            "pred_label": labels(outputs.pred_label, count),
            "raw_score": scores(self._raw_scores, count),
            "pred_score": scores(outputs.pred_score, count),
            "raw_threshold": [known(self._thresholds.raw)] * count,
            "threshold": [known(self._thresholds.normalized)] * count,
            "explanation": outputs.explanation or [""] * count,
            "picture": [self._picture(path) for path in paths],
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _picture(self, image_path: str) -> str:
        """Path of the picture in the run's folder; empty without a picture."""
        folder = output_folder(self._trainer)
        picture = picture_of(image_path, self._trainer, folder) if folder is not None and image_path else None
        if picture is None or not picture.is_file():
            return ""
        return (picture.relative_to(self._folder) if picture.is_relative_to(self._folder) else picture).as_posix()

    def end(self) -> None:
        """Write what is missing; with several processes, the first one writes the records of all."""
        self._add([])
        if self._trainer.world_size > 1:
            self._gather()
        self.write_coco()

    def _gather(self) -> None:
        shares = [[]] * self._trainer.world_size
        dist.all_gather_object(shares, self._records)
        self._records = sorted((record for share in shares for record in share), key=lambda record: record.place)
        for table, rows_of in self._tables:
            with self._sparing_metrics():
                if self._trainer.is_global_zero:
                    table.replace([row for record in self._records for row in rows_of(record)])
                else:
                    table.path.unlink(missing_ok=True)

    def write_coco(self) -> None:
        """Write the COCO file of the images so far, if there is to be one."""
        if self._settings.coco is not None and self._trainer.is_global_zero:
            paths = [record.prediction["image_path"] for record in self._records]
            images = (
                Outlined(path, read_header(path).size, record.defects, record.outlines)
                for path, record in zip(paths, self._records, strict=True)
            )
            with self._sparing_metrics():
                replace_file(self._settings.coco, annotation_file(images))

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Write the metrics of a test."""
        if self._trainer.is_global_zero:
            with self._sparing_metrics():
                replace_file(self._folder / METRICS, json.dumps(metrics, indent=4).encode())

    def _add(self, records: list[Record]) -> None:
        if self._keeps_records:
            self._records += records
        for table, rows_of in self._tables:
            with self._sparing_metrics():
                table.add([row for record in records for row in rows_of(record)])

    @contextmanager
    def _sparing_metrics(self) -> Iterator[None]:
        """Say once that a file cannot be written, and go on."""
        try:
            yield
        except OSError as error:
            self._say(f"{error.strerror or error} The metrics do not need it; this is said once.")

    def _say(self, message: str) -> None:
        if not self._said:
            logger.warning(message)
        self._said = True


def _flat(image: Tensor) -> Tensor:
    return image.reshape(image.shape[-2:])


def _categories(trainer: Trainer, dataset: Any) -> Callable[[str], str]:
    """What tells the category of an image, which is empty in a folder to predict."""
    if not isinstance(dataset, AnomalibDataset):
        return lambda _path: ""
    if "category" in dataset.samples:
        by_path = dict(zip(dataset.samples.image_path, dataset.samples.category, strict=True))
        return lambda path: by_path.get(path, "")
    name = category_name(trainer.datamodule if isinstance(trainer.datamodule, AnomalibDataModule) else dataset)
    return lambda _path: name
