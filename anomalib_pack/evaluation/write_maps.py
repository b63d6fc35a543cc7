"""The callback that writes the maps of a test run to files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from anomalib.data import AnomalibDataModule, Batch
from anomalib.data.datasets.base import AnomalibDataset
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_pack.checks import check_normal_validation_images
from anomalib_pack.data.image_files import read_header
from anomalib_pack.evaluation.layout import map_places
from anomalib_pack.evaluation.map_file import TIFF, write_map
from anomalib_pack.evaluation.submission import is_private, thresholds, write_submission
from anomalib_pack.metrics.original_size import at_size, check_whole_image
from anomalib_pack.metrics.samples import unpadded_count
from anomalib_pack.passes import one_pass


class WriteMaps(Callback):
    """Writes the raw anomaly map of each test image to a file, in the layout of the benchmark.

    A map is written as the model gives it, before it is normalised, at the size of the image file. The file is
    ``<root>/<category>/<path of the image in its category>.tiff`` in float32, for MVTec LOCO
    ``<root>/<category>/test/<group>/<image>.tiff``: what ``python -m anomalib_pack evaluate`` and the published
    evaluation read.

    Of the images of MVTec AD 2 whose ground truth only its server has (``test_type`` is ``private`` or
    ``private_mixed``), the files are those of a submission: ``anomaly_images/<category>/<test_type>/<image>.tiff`` in
    float16, and ``anomaly_images_thresholded/<category>/<test_type>/<image>.png``, 255 above the threshold and else 0.
    The threshold is the mean and three standard deviations of the pixels of the normal validation images, which the
    model is run on for it.

    A prediction with a datamodule writes the same files as a test.

    Args:
        root: Folder of the maps. With ``None``, the folder ``maps`` of the run.

    Raises:
        ValueError: In a run without a datamodule, of a model without maps or whose maps do not show whole images; if
            two images would get one file; or if a submission has no normal validation images.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[WriteMaps("maps")])
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = root
        self._places: dict[str, Path] = {}
        self._thresholds: dict[str, float] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out where the maps go, and what the thresholds of a submission are."""
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out where the maps go, and what the thresholds of a submission are."""
        self._start(trainer, pl_module, trainer.predict_dataloaders)

    def _start(self, trainer: Trainer, pl_module: LightningModule, loader: DataLoader) -> None:
        datamodule = trainer.datamodule
        dataset = getattr(loader, "dataset", None)
        if not isinstance(datamodule, AnomalibDataModule) or not isinstance(dataset, AnomalibDataset):
            msg = "WriteMaps needs a datamodule, whose categories and folders name the files of the maps."
            raise ValueError(msg)  # noqa: TRY004  # as for all other arguments of a run
        check_whole_image(pl_module, dataset)
        self._places = map_places(datamodule, dataset.samples)
        if any(map(is_private, self._places.values())):
            check_normal_validation_images(datamodule)
            self._thresholds = thresholds(_normal_maps(trainer, pl_module), trainer.world_size)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch. Callbacks of the trainer come before the model's post-processor."""
        del pl_module, batch
        self._write(trainer, outputs, unpadded_count(trainer.test_dataloaders, batch_idx, dataloader_idx))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch, as :meth:`on_test_batch_end`."""
        del pl_module, batch
        self._write(trainer, outputs, unpadded_count(trainer.predict_dataloaders, batch_idx, dataloader_idx))

    def _write(self, trainer: Trainer, outputs: Batch, count: int | None) -> None:
        folder = Path(self.root or Path(trainer.default_root_dir) / "maps")
        for image_path, anomaly_map in islice(_raw_maps(outputs), count):
            place = self._places[image_path]
            if is_private(place):
                write_submission(folder, place, anomaly_map, self._thresholds[place.parts[0]])
            else:
                write_map(folder / place.with_name(place.name + TIFF), anomaly_map.numpy())


def _normal_maps(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Category and map of each normal validation image of this process."""
    loader = trainer.datamodule.val_dataloader()
    places = map_places(trainer.datamodule, loader.dataset.samples)
    for index, batch in enumerate(one_pass(module, loader, "Threshold of a submission")):
        with trainer.precision_plugin.forward_context():
            outputs = module.test_step(batch, index)
        for (image_path, anomaly_map), label in zip(_raw_maps(outputs), outputs.gt_label.tolist(), strict=True):
            if not label:
                yield places[image_path].parts[0], anomaly_map


def _raw_maps(outputs: Batch) -> Iterator[tuple[str, Tensor]]:
    """Path of each image of a batch, and its map at the size of the file, (H, W) on the CPU."""
    if outputs.anomaly_map is None:
        msg = "WriteMaps needs a model with anomaly maps; this one has scores of images only."
        raise ValueError(msg)
    for image_path, anomaly_map in zip(outputs.image_path, outputs.anomaly_map.float().cpu(), strict=True):
        raw = anomaly_map.reshape(anomaly_map.shape[-2:])
        yield image_path, at_size(raw, read_header(image_path).size)
