"""The callback that writes what a test or prediction finds in each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anomalib.data import Batch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from anomalib_pack.records.defects import check_sizes
from anomalib_pack.records.recorder import Recorder, Settings

PREFIXES = {"test": "test_", "predict": ""}  # and what their files' names begin with


class WriteRecords(Callback):
    """Writes what a test or prediction finds in each image, as tables in the run's folder.

    - ``test_predictions.csv`` of a test and ``predictions.csv`` of a prediction: a row per image, in the order of the
      data set, with its path, category and group, its labels, its score before and after post-processing, and both
      thresholds.
    - ``test_defects.csv`` or ``defects.csv`` beside it: a row per connected region of the predicted mask, in pixels of
      the image file. The map is brought to the file's size before the pixel threshold meets it. It is left out, with a
      warning, for a model whose maps do not show whole images.
    - ``test_metrics.json``: all metrics of a test.

    Rows are in the files after each batch. With several processes each writes its own, and the first one all of them at
    the end.

    All models of the pack have this callback; one among the ``callbacks`` of the trainer takes its place, and gives any
    other model of Anomalib's its records.

    Args:
        min_area: Least number of pixels of a defect, in the image file. With it, smaller regions are dropped from the
            predicted masks before metrics and pictures see them, and an image is anomalous only if its score says so
            and a defect is left. Scores stay as they are.
        pixel_size: Width and height of a pixel of the image files in millimetres, for areas in square millimetres.
        coco: File for the defects as annotations in the format of COCO, with their outer borders as polygons.
        json_lines: Write each table also as JSON Lines, with the same keys: ``test_predictions.jsonl``.

    Raises:
        ValueError: If ``min_area`` is negative or ``pixel_size`` not above 0; in a run with ``min_area`` or ``coco``,
            if maps do not show whole images.
        OSError: In such a run, if an image has no file.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[WriteRecords(min_area=20, pixel_size=0.05)])
    """

    def __init__(
        self,
        min_area: int = 0,
        pixel_size: float | None = None,
        coco: str | Path | None = None,
        json_lines: bool = False,
    ) -> None:
        check_sizes(min_area, pixel_size)
        self.settings = Settings(min_area, pixel_size, None if coco is None else Path(coco), json_lines)
        self._recorder: Recorder | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take places: before all others, after the post-processor, and after all others."""
        self._recorder = None
        if stage not in PREFIXES:
            return
        others = self._others(trainer)
        post_processor = getattr(pl_module, "post_processor", None)
        after = next((index for index, each in enumerate(others, 1) if each is post_processor), 0)
        first, second, last = (_Place(self, name) for name in ("take_raw", "find_defects", "write"))
        # A new list, because the trainer is on its way through this one.
        trainer.callbacks = [first, *others[:after], second, *others[after:], last]

    def teardown(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Give the places back."""
        trainer.callbacks = self._others(trainer)
        self._recorder = None

    def _others(self, trainer: Trainer) -> list[Callback]:
        return [each for each in trainer.callbacks if not (isinstance(each, _Place) and each.owner is self)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty files."""
        self._start(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty files."""
        self._start(trainer, pl_module, "predict", trainer.predict_dataloaders)

    def _start(self, trainer: Trainer, module: LightningModule, stage: str, loader: Any) -> None:
        loaders = loader if isinstance(loader, list) else [loader]
        # A batch of Anomalib's tiled ensemble has one tile of each image.
        has_tiles = any(hasattr(getattr(each, "collate_fn", None), "tile_index") for each in loaders)
        self._recorder = None if has_tiles else Recorder(trainer, module, PREFIXES[stage], loaders, self.settings)

    def at(self, name: str, outputs: Batch, dataloader_idx: int) -> None:
        """Do what belongs to a place among the callbacks."""
        if self._recorder is not None:
            getattr(self._recorder, name)(outputs, dataloader_idx)

    def on_test_end(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Write the records of all processes, and the metrics."""
        if self._recorder is not None:
            self._recorder.end()
            self._recorder.write_metrics({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_predict_end(self, _trainer: Trainer, _pl_module: LightningModule) -> None:
        """Write the records of all processes."""
        if self._recorder is not None:
            self._recorder.end()

    def on_exception(self, _trainer: Trainer, _pl_module: LightningModule, _exception: BaseException) -> None:
        """Write the COCO file of the images so far; tables have them."""
        if self._recorder is not None:
            self._recorder.write_coco()


class _Place(Callback):
    """A place among the callbacks at which :class:`WriteRecords` looks at a batch."""

    def __init__(self, owner: WriteRecords, name: str) -> None:
        self.owner = owner
        self.name = name

    def on_test_batch_end(
        self, _trainer: Trainer, _module: LightningModule, outputs: Batch, _batch: Batch, _index: int, loader: int = 0
    ) -> None:
        """Look at a batch."""
        self.owner.at(self.name, outputs, loader)

    on_predict_batch_end = on_test_batch_end
