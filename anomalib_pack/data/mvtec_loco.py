"""MVTec LOCO AD with anomaly groups.

Bergmann, Batzner, Fauser, Sattlegger, Steger: Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly
Detection and Localization, IJCV 130, 2022, doi:10.1007/s11263-022-01578-9. The images are CC BY-NC-SA 4.0.

Anomalib's own ``MVTecLOCO`` reads the same folders. This one tells logical from structural anomalies, works with
pandas 3, downloads the data set, and says which file is wrong when one is.
"""

import logging
from pathlib import Path

from anomalib.data.datamodules.image.mvtec_loco import MVTecLOCO
from anomalib.data.datasets.image.mvtec_loco import CATEGORIES, DOWNLOAD_INFO, IMG_EXTENSIONS
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode, download_and_extract
from anomalib.data.utils.download import generate_hash
from anomalib.utils.path import resolve_dataset_root
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.defects_config import CONFIG, read_defects
from anomalib_pack.data.first_look import LooksAtFiles
from anomalib_pack.data.image_files import check_white_level, list_images, list_split
from anomalib_pack.data.masked import MaskedImageDataset, sample_of
from anomalib_pack.data.vanished import ReportsVanished
from anomalib_pack.defect import Defect

logger = logging.getLogger(__name__)

# The folder of each split; Anomalib calls the validation split "val".
SPLIT_FOLDERS = {Split.TRAIN: "train", Split.VAL: "validation", Split.TEST: "test"}


class MVTecLocoDataset(MaskedImageDataset):
    """One category of MVTec LOCO, or of any data set in its folder format.

    Every item is a :class:`~anomalib_pack.data.GroupedImageItem`: ``group`` is the name of the image's folder
    (``logical_anomalies``, ``structural_anomalies``), and the empty string for ``good``. ``gt_mask`` is the union of
    all masks of the image; ``mask_path`` is the folder that holds them, one file per defect, and the empty string for
    ``good``.

    Args:
        root: Folder of the data set, which holds one folder per category. With ``None``, Anomalib's datasets folder.
        category: Folder of the category.
        augmentations: Applied to image and mask together.
        split: ``"train"``, ``"val"`` or ``"test"``; ``None`` reads all three.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.

    Raises:
        FileNotFoundError: If the folder of the category or of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no masks.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        category: str = "breakfast_box",
        augmentations: Transform | None = None,
        split: str | Split | None = None,
        white_level: float | None = None,
    ) -> None:
        super().__init__(augmentations, white_level)
        self.root_category = resolve_dataset_root(root, "MVTec_LOCO") / category
        self.category = category
        self.split = split
        self.samples = make_dataset(self.root_category, split)

    @staticmethod
    def mask_files(mask_path: Path) -> list[Path]:
        """List the files in the folder of masks, one per defect."""
        return list_images(mask_path, IMG_EXTENSIONS)

    def defects(self, image_path: str) -> list[Defect]:
        """Read the defects of an image, one for each of its masks; none if it is normal.

        Args:
            image_path: Path of the image, as ``samples`` has it.

        Raises:
            OSError: If ``defects_config.json``, which lies in the folder of the category, is missing, or a file cannot
                be read.
            ValueError: If the configuration contradicts itself or a mask; the message names the file and the pixel
                value.
        """
        mask_path = sample_of(self.samples, image_path).mask_path
        if not mask_path:
            return []
        return read_defects(self.root_category / CONFIG, self.mask_files(Path(mask_path)), image_path)


def make_dataset(root_category: Path, split: str | Split | None = None) -> DataFrame:
    """List the images of a category, or of one of its splits.

    Args:
        root_category: Folder of the category.
        split: ``"train"``, ``"val"`` or ``"test"``; ``None`` lists all three.

    Returns:
        One row per image with the columns that Anomalib's datasets have (``path``, ``split``, ``label``,
        ``image_path``, ``mask_path``, ``label_index``) and ``group``. ``mask_path`` is the folder with the masks of
        the image, ``""`` for a normal one.

    Raises:
        FileNotFoundError: If the folder of the category or of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no masks.
    """
    splits = SPLIT_FOLDERS if split is None else [Split(split)]
    samples = DataFrame([row for each in splits for row in _split_rows(root_category, each)])
    # Anomalib writes no masks with its result pictures for a classification task.
    samples.attrs["task"] = "segmentation"
    return samples


def _split_rows(root_category: Path, split: Split) -> list[dict]:
    remedy = "Check `root` and `category`, or call prepare_data() to get the data set."
    paths = list_split(root_category / SPLIT_FOLDERS[split], IMG_EXTENSIONS, remedy)
    return [_row(root_category, split, path) for path in paths]


def _row(root_category: Path, split: Split, image_path: Path) -> dict:
    label = image_path.parent.name
    is_good = label == "good"
    return {
        "path": str(root_category),
        "split": split.value,
        "label": label,
        "image_path": str(image_path),
        "mask_path": "" if is_good else str(_mask_folder(root_category, label, image_path)),
        "label_index": int(LabelName.NORMAL if is_good else LabelName.ABNORMAL),
        "group": "" if is_good else label,
    }


def _mask_folder(root_category: Path, label: str, image_path: Path) -> Path:
    folder = root_category / "ground_truth" / label / image_path.stem
    if not folder.is_dir() or not list_images(folder, IMG_EXTENSIONS):
        msg = (
            f"The anomalous image {image_path} has no masks: {folder} is missing or empty. "
            "Restore that folder (one PNG per defect), or remove the image."
        )
        raise RuntimeError(msg)
    return folder


class MVTecLoco(LooksAtFiles, ReportsVanished, MVTecLOCO):
    """MVTec LOCO with anomaly groups.

    The arguments are those of Anomalib's ``MVTecLOCO`` and one more. Differences: batches are
    :class:`~anomalib_pack.data.GroupedImageBatch`, and ``prepare_data`` downloads the data set (several gigabytes)
    where ``root`` does not exist yet or is empty.

    Args:
        root: Folder of the data set, which holds one folder per category. With ``None``, Anomalib's datasets folder.
        category: Folder of the category.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers per data loader.
        train_augmentations: Applied to training images.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where the split has none of its own.
        test_split_mode: How the test set is made.
        val_split_mode: How the validation set is made.
        test_split_ratio: Share of the images that a split for testing takes.
        val_split_ratio: Share of the images that a split for validation takes.
        seed: Seed of random splits.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.

    Raises:
        ValueError: If ``white_level`` is not above 0.

    Example:
        >>> datamodule = MVTecLoco(root="./datasets/MVTec_LOCO", category="pushpins", eval_batch_size=8)
        >>> datamodule.name, datamodule.category
        ('MVTecLoco', 'pushpins')
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/MVTec_LOCO",
        category: str = "breakfast_box",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_DIR,
        test_split_ratio: float | None = None,
        val_split_ratio: float | None = None,
        seed: int | None = None,
        white_level: float | None = None,
    ) -> None:
        super().__init__(
            root=root,
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            val_split_mode=val_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.white_level = check_white_level(white_level)

    def prepare_data(self) -> None:
        """Download and extract the data set where there is none.

        Raises:
            ValueError: If ``root`` holds files, but not this category, or if MVTec LOCO has no such category. Nothing
                is downloaded then. Also if an archive left in ``root`` by an earlier run is not complete.
        """
        if (self.root / self.category).is_dir():
            logger.info("Found the dataset.")
            return
        archive = self.root / DOWNLOAD_INFO.url.rsplit("/", 1)[-1]
        if archive.is_file():
            # Anomalib deletes the archive once it is extracted, so an earlier run was cut off.
            _check_archive(archive)
        else:
            self._check_downloadable()
        download_and_extract(self.root, DOWNLOAD_INFO)

    def _check_downloadable(self) -> None:
        """Keep a wrong path or a misspelt category from starting a download of gigabytes."""
        found = list_categories(self.root)
        if found:
            msg = f"There is no category {self.category!r} in {self.root}; found there: {', '.join(found)}."
            raise ValueError(msg)
        if self.category not in CATEGORIES:
            msg = (
                f"There is no folder {self.root / self.category} and nothing to download: "
                f"{self.category!r} is not a category of MVTec LOCO, which has {', '.join(CATEGORIES)}."
            )
            raise ValueError(msg)
        if self.root.is_dir() and any(self.root.iterdir()):
            msg = (
                f"{self.root} holds files, but no category in the format of MVTec LOCO. Correct `root`, "
                "or give a new or empty folder to download the data set into."
            )
            raise ValueError(msg)

    def _setup(self, _stage: str | None = None) -> None:
        """Read the three splits; Anomalib's base class then applies the split modes."""
        self.train_data = self._split(Split.TRAIN)
        self.test_data = self._split(Split.TEST)
        # The other modes make their own validation set, so the folder may be missing.
        if self.val_split_mode in {ValSplitMode.FROM_DIR, ValSplitMode.NONE}:
            self.val_data = self._split(Split.VAL)

    def _split(self, split: Split) -> MVTecLocoDataset:
        return MVTecLocoDataset(self.root, self.category, split=split, white_level=self.white_level)


def _check_archive(archive: Path) -> None:
    if generate_hash(archive, "sha256") != DOWNLOAD_INFO.hashsum:
        msg = f"{archive} is not the complete archive of MVTec LOCO. Delete it, and run again to download it anew."
        raise ValueError(msg)


def list_categories(root: Path) -> list[str]:
    """Return the names of the folders in ``root`` that have the format of MVTec LOCO; none if ``root`` is missing."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if (path / "train" / "good").is_dir())
