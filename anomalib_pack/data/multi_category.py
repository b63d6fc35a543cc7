"""One model over several categories, with metrics for each.

The datamodule wraps one datamodule per category::

    prepare_data    data set or categories that are missing: each category's own prepare_data
    setup           each category's own images and splits --join--> train, val and test data, group by category
                    stock evaluator of the model -> GroupEvaluator
"""

import inspect
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from anomalib.data import AnomalibDataModule, Folder
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.metrics import AUROC, Evaluator
from lightning import Trainer
from torch.nn import ModuleList
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.categories import DatasetCategories, FolderCategories, with_readable_names
from anomalib_pack.data.first_look import LooksAtFiles
from anomalib_pack.data.image_files import check_white_level
from anomalib_pack.data.joined import MultiCategoryDataset
from anomalib_pack.data.validation import OptionalValidation
from anomalib_pack.data.vanished import ReportsVanished
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics

logger = logging.getLogger(__name__)


class MultiCategory(LooksAtFiles, ReportsVanished, OptionalValidation, AnomalibDataModule):
    """Several categories of a data set for one model, with metrics per category.

    Training images of all categories are shuffled together, each as likely as any other; the model is not told the
    category. Batches are :class:`~anomalib_pack.data.GroupedImageBatch` with a ``group``, by which
    :class:`~anomalib_pack.metrics.GroupEvaluator` reports metrics: the category, or with ``group_by="group"`` the
    category and the group of its own data set, as ``pushpins/logical_anomalies``. A model with Anomalib's own
    ``Evaluator`` gets a ``GroupEvaluator`` with the same metrics and what is missing of ``default_test_metrics``; any
    other is left alone.

    ``name`` is the name of the folder that all images lie below. Anomalib keeps what follows it of an image's path in
    the path of the result picture.

    Args:
        dataset: Name of a datamodule with ``root`` and ``category``, e.g. ``"MVTecAD"``, or ``Folder`` datamodules,
            each of which is a category with the name that it has. Augmentations of its own come before those below.
        root: Folder of the data set; None means the default of the datamodule. Not for a list of ``Folder``.
        categories: Names of the categories; ``"all"`` takes those that are found in ``root``. Not for a list of
            ``Folder``.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers per data loader.
        train_augmentations: Applied to training images.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where the split has none of its own.
        test_split_mode: How the test set of each category is made; this and the four arguments that follow are those
            of the wrapped datamodule, and None means its default.
        test_split_ratio: Share of a category's images that a split for testing takes.
        val_split_mode: How the validation set of each category is made.
        val_split_ratio: Share of a category's images that a split for validation takes.
        seed: Seed of random splits.
        dataset_args: Further arguments of the wrapped datamodule, e.g. ``{"resolution": 512}`` for Real-IAD.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.
        group_by: What metrics are reported for: ``"category"``, or ``"group"`` for the groups that the wrapped
            datamodule has within each category, e.g. logical and structural anomalies of MVTec LOCO.

    Raises:
        ValueError: If an argument is not possible, or ``Folder`` datamodules have equal names or no common folder.

    Example:
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD", categories=["bottle", "cable"])
        >>> datamodule.name
        'MVTecAD'
    """

    def __init__(
        self,
        dataset: str | list[Folder],
        root: str | Path | None = None,
        categories: list[str] | Literal["all"] = "all",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str | None = None,
        test_split_ratio: float | None = None,
        val_split_mode: ValSplitMode | str | None = None,
        val_split_ratio: float | None = None,
        seed: int | None = None,
        dataset_args: dict[str, Any] | None = None,
        white_level: float | None = None,
        group_by: Literal["category", "group"] = "category",
    ) -> None:
        if group_by not in {"category", "group"}:
            msg = f"group_by must be 'category' or 'group', got {group_by!r}."
            raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            seed=seed,
        )
        splits = {
            "test_split_mode": test_split_mode,
            "test_split_ratio": test_split_ratio,
            "val_split_mode": val_split_mode,
            "val_split_ratio": val_split_ratio,
            "seed": seed,
        }
        splits = {name: value for name, value in splits.items() if value is not None}
        if isinstance(dataset, str):
            own = inspect.signature(MultiCategory).parameters
            for name in dataset_args or {}:
                if name in own or name == "category":
                    msg = f"dataset_args must not have {name}, which is for MultiCategory itself."
                    raise ValueError(msg)
            self._source = DatasetCategories(dataset, root, categories, {**splits, **(dataset_args or {})})
        else:
            for name, value, default in (
                ("root", root, None),
                ("categories", categories, "all"),
                ("dataset_args", dataset_args, None),
            ):
                if value != default:
                    msg = f"{name} must not be given with a list of Folder, each of which has its own, got {value!r}."
                    raise ValueError(msg)
            self._source = FolderCategories(dataset, splits)
        self.root = Path(self._source.root)
        self.white_level = check_white_level(white_level)
        self.group_by = group_by

    @property
    def name(self) -> str:
        """Name of the folder that all images lie below."""
        return self.root.name

    def datamodules(self) -> dict[str, AnomalibDataModule]:
        """Return the datamodule of each category, which splits its images as they are split here.

        Raises:
            ValueError: If a category is not there.
        """
        return self._source.datamodules()

    def prepare_data(self) -> None:
        """Get the data set or the categories that are missing, as the wrapped datamodule does.

        Raises:
            ValueError: If ``root`` holds files, but no category. Nothing is downloaded then. Also if a category is not
                there.
        """
        self._source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the data, and the running model's report of metrics per category."""
        super().setup(stage)
        if self.trainer is not None:
            report_groups(self.trainer)

    def _setup(self, stage: str | None = None) -> None:
        """Let each category's datamodule set up and split its images, and join them.

        Raises:
            ValueError: If a category is not there or has no training images.
        """
        parts = self.datamodules()
        for category, part in parts.items():
            with with_readable_names(part):
                part.setup(stage)
            if len(part.train_data) == 0:
                msg = f"The category {category!r} has no training images in {self._source.folders(category)[0]}."
                raise ValueError(msg)
        logger.info("Categories: %s.", ", ".join(parts))
        self.train_data = self._join({category: part.train_data for category, part in parts.items()})
        # MVTec AD 2 tests on other images than its test_data.
        self.test_data = self._join({category: part.test_dataloader().dataset for category, part in parts.items()})
        validation = {category: part.val_data for category, part in parts.items() if hasattr(part, "val_data")}
        if validation:
            self.val_data = self._join(validation)

    def _join(self, datasets: dict[str, AnomalibDataset]) -> MultiCategoryDataset:
        links = {category: self._links(category, dataset) for category, dataset in datasets.items()}
        return MultiCategoryDataset(datasets, links, self.white_level, self.group_by)

    def _links(self, category: str, dataset: AnomalibDataset) -> dict[str, str]:
        """Folders of the category's images as Anomalib has them, and the paths of the same folders below the root."""
        links = {os.path.realpath(folder): folder for folder in self._source.folders(category)}
        if isinstance(dataset, SyntheticAnomalyDataset):
            # In a temporary folder, with the same file names in each category.
            link = dataset.root / self.name / category / dataset.im_dir.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                _link_or_copy(link, dataset.im_dir)
            links[str(dataset.im_dir)] = str(link)
        return links

    def _create_test_split(self) -> None:
        """Each category's datamodule has made its own."""

    def _create_val_split(self) -> None:
        """Each category's datamodule has made its own."""


def _link_or_copy(link: Path, folder: Path) -> None:
    """Make a folder reachable by another path, also where links need a right that users lack, as in Windows."""
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, link)


def report_groups(trainer: Trainer) -> None:
    """Replace the running model's evaluator by one that reports groups, if it is Anomalib's own.

    When a datamodule is set up, the evaluator is one of the trainer's callbacks already.
    """
    model = trainer.lightning_module
    stock = getattr(model, "evaluator", None)
    if type(stock) is not Evaluator:
        return
    # Anomalib's AUROC of the pixels of thousands of images needs gigabytes; the one among the default metrics does not.
    kept = [metric for metric in stock.test_metrics if not (type(metric) is AUROC and metric.name == "pixel_AUROC")]
    names = {metric.name for metric in kept}
    added = [metric for metric in default_test_metrics() if metric.name not in names]
    evaluator = GroupEvaluator(list(stock.val_metrics), compute_on_cpu=stock.compute_on_cpu)
    # In a module list, as Anomalib has them, so that checkpoints fit: AUPRO has a buffer there.
    evaluator.test_metrics = ModuleList([*kept, *added])
    evaluator.log = model.log  # as Lightning does for all callbacks
    model.evaluator = evaluator
    trainer.callbacks = [evaluator if callback is stock else callback for callback in trainer.callbacks]
    logger.info(
        "Replaced the Evaluator of %s by a GroupEvaluator, which reports per category too: %s.",
        model.name,
        ", ".join(metric.name for metric in evaluator.test_metrics),
    )
