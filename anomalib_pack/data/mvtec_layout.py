"""MVTec AD's layout: a list of the images of a split, and what the datamodules of such data sets have in common."""

from pathlib import Path
from typing import Any

from anomalib.data.utils import LabelName, Split
from pandas import DataFrame

from anomalib_pack.data.first_look import LooksAtFiles
from anomalib_pack.data.image_files import check_white_level, list_images, list_split, require_folder
from anomalib_pack.data.masked import MaskedImageDataset
from anomalib_pack.data.validation import NoValidationImages
from anomalib_pack.data.vanished import ReportsVanished

# Masks are lossless in all data sets that are read here.
MASK_EXTENSIONS = (".png", ".PNG")


class MVTecLayout(LooksAtFiles, ReportsVanished, NoValidationImages):
    """Mixin for datamodules of data sets in this layout that are not downloaded; stands before ``AnomalibDataModule``.

    Args:
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.
        arguments: Those of ``AnomalibDataModule``.

    Attributes:
        remedy: What to do if the folder is missing, a sentence.
    """

    remedy: str

    def __init__(self, white_level: float | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.white_level = check_white_level(white_level)

    @property
    def folder(self) -> Path:
        """Folder that holds ``train``, ``test`` and ``ground_truth``."""
        raise NotImplementedError

    def read(self, split: Split) -> MaskedImageDataset:
        """List the images of a split."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Check that the data set is there. Nothing is downloaded.

        Raises:
            FileNotFoundError: If it is not; the message says where to get the data set.
        """
        require_folder(self.folder, self.remedy)

    def _setup(self, _stage: str | None = None) -> None:
        """List the images of both splits; Anomalib's base class then applies the split modes."""
        self.train_data = self.read(Split.TRAIN)
        self.test_data = self.read(Split.TEST)


def make_mvtec_samples(
    root: Path, split: str | Split, extensions: tuple[str, ...], remedy: str, levels: str = "*"
) -> DataFrame:
    """List the images of a split in MVTec AD's layout.

    Images are in ``<root>/<split>/<label>/``, or in folders below; ``label`` is ``good`` or the type of defect. The
    mask of an anomalous image has the stem of its name, and below ``<root>/ground_truth/`` the path that the image has
    below ``<root>/<split>/``.

    Args:
        root: Folder that holds ``train``, ``test`` and ``ground_truth``.
        split: ``"train"`` or ``"test"``.
        extensions: File name extensions of images, with the dot.
        remedy: What to do if the folder of the split is missing, a sentence.
        levels: Pattern of the folders that hold the images, relative to the split's.

    Returns:
        One row per image with the columns that Anomalib's datasets have: ``path``, ``split``, ``label``,
        ``image_path``, ``mask_path``, ``label_index``.

    Raises:
        FileNotFoundError: If the folder of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no mask or several.
    """
    folder = root / Split(split).value
    samples = DataFrame([_row(root, folder, path) for path in list_split(folder, extensions, remedy, levels)])
    # Anomalib writes no masks with its result pictures for a classification task.
    samples.attrs["task"] = "segmentation"
    return samples


def _row(root: Path, folder: Path, image_path: Path) -> dict:
    relative = image_path.relative_to(folder)
    label = relative.parts[0]
    is_good = label == "good"
    return {
        "path": str(root),
        "split": folder.name,
        "label": label,
        "image_path": str(image_path),
        "mask_path": "" if is_good else str(_mask_of(image_path, root / "ground_truth" / relative.parent)),
        "label_index": int(LabelName.NORMAL if is_good else LabelName.ABNORMAL),
    }


def _mask_of(image_path: Path, folder: Path) -> Path:
    files = list_images(folder, MASK_EXTENSIONS) if folder.is_dir() else []
    masks = [path for path in files if path.stem == image_path.stem]
    if len(masks) != 1:
        msg = (
            f"The anomalous image {image_path} has {len(masks)} masks, but must have one: "
            f"{folder / image_path.stem}.png. Restore that file, or remove the image."
        )
        raise RuntimeError(msg)
    return masks[0]
