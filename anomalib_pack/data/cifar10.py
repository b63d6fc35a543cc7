"""CIFAR-10 as UniAD uses it: five classes are normal, the other five anomalous.

You, Cui, Shen, Yang, Lu, Zheng, Le: A Unified Model for Multi-class Anomaly Detection, NeurIPS 2022, arXiv:2206.03687,
Sec. 4.4 and appendix B.4. Data: Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html; torchvision downloads, checks and reads it.

The images are written out as files, because Anomalib's visualizer opens ``image_path`` and its datasets refuse rows
whose ``image_path`` does not exist.
"""

import logging
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from anomalib.data import AnomalibDataModule, ImageItem
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from pandas import DataFrame
from rich.progress import track
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2.functional import resize

from anomalib_pack.data.image_files import ReadsImages, read_image
from anomalib_pack.data.validation import NoValidationImages
from anomalib_pack.files import new_folder

logger = logging.getLogger(__name__)

# The four combinations of Table 3, which names them by the indices of the normal classes.
NormalClasses = Literal["01234", "56789", "02468", "13579"]

# In CIFAR-10's own order, which is also the order of the sorted names that the paper takes its indices from.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Beside torchvision's "cifar-10-batches-py".
IMAGE_FOLDER = "cifar-10-png"

# For an image that cannot be read.
REMEDY = f"Delete its folder {IMAGE_FOLDER}, and run again to have it written anew."


class CIFAR10UnifiedDataset(ReadsImages, AnomalibDataset):
    """Images of one split of CIFAR-10, five classes of which are normal.

    The training split has the images of the normal classes only, the test split those of all ten. An item has an
    image (float RGB in [0, 1], resized bilinearly), ``gt_label`` and ``image_path``; there are no masks.

    Args:
        root: Folder that ``CIFAR10Unified.prepare_data`` filled. With ``None``, Anomalib's datasets folder.
        normal_classes: Indices of the normal classes: ``"01234"``, ``"56789"``, ``"02468"`` or ``"13579"``.
        split: ``"train"`` or ``"test"``.
        image_size: Side of the images in pixels, or (height, width).
        augmentations: Applied to the resized images.

    Raises:
        FileNotFoundError: If a class has no images.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        normal_classes: NormalClasses = "01234",
        split: str | Split = Split.TRAIN,
        image_size: int | tuple[int, int] = 128,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.image_size = _height_and_width(image_size)
        self.category = normal_classes
        self.samples = make_dataset(resolve_dataset_root(root, "CIFAR10"), normal_classes, split)

    def __getitem__(self, index: int) -> ImageItem:
        """Read and resize an image.

        Raises:
            OSError: If the image cannot be read.
        """
        sample = self.samples.iloc[index]
        image = resize(read_image(sample.image_path, remedy=REMEDY), self.image_size)
        if self.augmentations:
            image = self.augmentations(image)
        return ImageItem(image=image, gt_label=torch.tensor(sample.label_index), image_path=sample.image_path)


def make_dataset(root: Path, normal_classes: NormalClasses, split: str | Split) -> DataFrame:
    """List the images of a split.

    Args:
        root: Folder that ``CIFAR10Unified.prepare_data`` filled.
        normal_classes: Indices of the normal classes.
        split: ``"train"``, which lists the normal classes only, or ``"test"``.

    Returns:
        One row per image: ``image_path``, ``label`` (name of the class), ``label_index`` and ``split``.

    Raises:
        FileNotFoundError: If a class has no images.
    """
    split = Split(split)
    samples = DataFrame(
        [
            {"image_path": str(path), "label": name, "label_index": int(label_index), "split": split.value}
            for name, label_index in zip(CLASSES, _label_indices(normal_classes), strict=True)
            if split == Split.TEST or label_index == LabelName.NORMAL
            for path in _image_files(root, split, name)
        ]
    )
    samples.attrs["task"] = "classification"
    return samples


def _label_indices(normal_classes: NormalClasses) -> list[LabelName]:
    return [LabelName.NORMAL if str(index) in normal_classes else LabelName.ABNORMAL for index in range(len(CLASSES))]


def _image_files(root: Path, split: Split, name: str) -> list[Path]:
    folder = root / IMAGE_FOLDER / split.value / name
    paths = sorted(folder.glob("*.png"))
    if not paths:
        msg = (
            f"There are no images in {folder}. Check `root`, or call prepare_data() to get the data set; "
            f"if {root / IMAGE_FOLDER} is incomplete, delete it first."
        )
        raise FileNotFoundError(msg)
    return paths


class CIFAR10Unified(NoValidationImages, AnomalibDataModule):
    """CIFAR-10 with five normal and five anomalous classes.

    The training set has the 25 000 training images of the normal classes, less those that validation takes; the test
    set has all 10 000 test images. ``prepare_data`` lets torchvision download CIFAR-10 (170 MB) where ``root`` does not
    exist yet or is empty, and writes the images to ``<root>/cifar-10-png``. CIFAR-10's own
    files are not needed after that.

    Args:
        root: Folder of the data set. With ``None``, Anomalib's datasets folder.
        normal_classes: Indices of the normal classes among the sorted names: ``"01234"``, ``"56789"``, ``"02468"`` or
            ``"13579"`` (Table 3). In YAML they need quotes.
        image_size: Side of the images in pixels, or (height, width). CIFAR-10 has 32x32, which are resized bilinearly;
            128 as in appendix B.4.
        train_batch_size: Training batch size; 128 as in appendix B.4.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers per data loader.
        train_augmentations: Applied to training images.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where the split has none of its own.
        val_split_mode: How the validation set is made: ``"from_train"`` (normal images only), ``"from_test"``,
            ``"same_as_test"`` or ``"none"``, which leaves scores raw and sets no threshold. The paper trains on all
            normal images, which the last three do.
        val_split_ratio: Share of the images that validation takes; ours, 1 250 images for ``"from_train"``.
        seed: Seed of the validation split.

    Raises:
        ValueError: If an argument has none of the values above.

    Example:
        >>> datamodule = CIFAR10Unified(normal_classes="02468")
        >>> datamodule.name, datamodule.category, datamodule.image_size
        ('CIFAR10Unified', '02468', (128, 128))
    """

    looks_at_files = False  # prepare_data wrote them
    impossible: ClassVar = {
        **NoValidationImages.impossible,
        ValSplitMode.SYNTHETIC: "Anomalib would take the 32x32 images for it, whatever the image_size",
    }

    def __init__(
        self,
        root: Path | str | None = "./datasets/CIFAR10",
        normal_classes: NormalClasses = "01234",
        image_size: int | tuple[int, int] = 128,
        train_batch_size: int = 128,
        eval_batch_size: int = 128,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.05,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        _check_normal_classes(normal_classes)
        self.root = resolve_dataset_root(root, "CIFAR10")
        self.image_size = _height_and_width(image_size)
        self.category = normal_classes

    def prepare_data(self) -> None:
        """Download CIFAR-10 where there is none, and write its images where they are missing.

        The images appear under their final name only when all are written, so a run that was killed is done anew (what
        it left is a hidden folder in ``root``, ``.writing-*``, which may be deleted).

        Raises:
            ValueError: If ``root`` holds files, but not CIFAR-10, in which case nothing is downloaded; or if one of
                CIFAR-10's files is missing or damaged, which the message names.
            OSError: If the download fails.
        """
        folder = self.root / IMAGE_FOLDER
        if folder.is_dir():
            logger.info("Found the dataset.")
            return
        if (self.root / CIFAR10.base_folder).is_dir():
            _check_files(self.root / CIFAR10.base_folder)
        else:
            _check_downloadable(self.root)
        splits = {Split.TRAIN: _load(self.root, train=True), Split.TEST: _load(self.root, train=False)}
        with new_folder(folder) as written:
            for split, images in splits.items():
                _write_images(written / split.value, images)

    def _setup(self, _stage: str | None = None) -> None:
        """List the images of both splits; Anomalib's base class then applies the split mode."""
        self.train_data = CIFAR10UnifiedDataset(self.root, self.category, Split.TRAIN, self.image_size)
        self.test_data = CIFAR10UnifiedDataset(self.root, self.category, Split.TEST, self.image_size)


def _check_normal_classes(normal_classes: NormalClasses) -> None:
    if normal_classes not in get_args(NormalClasses):
        hint = "" if isinstance(normal_classes, str) else " In YAML, put it in quotes: without them it is a number."
        msg = f"normal_classes must be one of {', '.join(get_args(NormalClasses))}, got {normal_classes!r}.{hint}"
        raise ValueError(msg)


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    # Anomalib's get_datamodule turns every image_size into a pair.
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        msg = f"image_size must be at least 1, got {image_size}."
        raise ValueError(msg)
    return height, width


def _check_files(folder: Path) -> None:
    """Name the file that is wrong; torchvision does not."""
    checksums = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    for name, md5 in checksums:
        if not check_integrity(folder / name, md5):
            state = "damaged" if (folder / name).is_file() else "missing"
            msg = f"CIFAR-10's file {folder / name} is {state}. Delete {folder}, and run again to get it anew."
            raise ValueError(msg)


def _check_downloadable(root: Path) -> None:
    """Keep a wrong path from starting a download into a folder that has another purpose."""
    # The archive is there if it was put there by hand, or if a download was cut off.
    if root.is_dir() and any(path.name != CIFAR10.filename for path in root.iterdir()):
        msg = (
            f"{root} holds files, but no folder {CIFAR10.base_folder}. Correct `root`, "
            "or give a new or empty folder to download CIFAR-10 into."
        )
        raise ValueError(msg)


def _load(root: Path, train: bool) -> CIFAR10:
    try:
        return CIFAR10(root, train=train, download=True)  # downloads what is missing, and compares checksums
    except (OSError, RuntimeError) as error:
        msg = (
            f"Cannot get CIFAR-10 into {root}: {error}. Without a network, put {CIFAR10.filename} from {CIFAR10.url} "
            "into that folder, and run again."
        )
        raise OSError(msg) from error


def _write_images(folder: Path, images: CIFAR10) -> None:
    """Write ``<folder>/<class>/<index in CIFAR-10's split>.png``."""
    for name in images.classes:
        (folder / name).mkdir(parents=True)
    for index in track(range(len(images)), f"Writing CIFAR-10 {folder.name}"):
        image, target = images[index]
        image.save(folder / images.classes[target] / f"{index:05}.png")
