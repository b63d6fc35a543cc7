"""AeBAD-S: blades of aero-engines, with test images from domains that training has not seen.

Zhang, Zhao, Zhang, Sun, Chen: Industrial Anomaly Detection with Domain Shift: A Real-world Dataset and Masked
Multi-scale Reconstruction, Computers in Industry 151, 2023. Data: https://github.com/zhangzilongc/MMR. The videos of
the same data set, AeBAD-V, are not read.

The layout that is read is the published one::

    <root>/AeBAD_S/train/good/<domain>/<name>.png              domains background, illumination, view
    <root>/AeBAD_S/test/good/<domain>/<name>.png               domains background, illumination, same, view
    <root>/AeBAD_S/test/<type of defect>/<domain>/<name>.png   ablation, breakdown, fracture, groove
    <root>/AeBAD_S/ground_truth/<type of defect>/<domain>/<name>.png
"""

from pathlib import Path

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.masked import MaskedImageDataset
from anomalib_pack.data.mvtec_layout import MVTecLayout, make_mvtec_samples

# The part of the data set that is read.
SUBSET = "AeBAD_S"

IMG_EXTENSIONS = (".png", ".PNG")

# For a folder that is missing.
REMEDY = (
    "Check `root`. AeBAD is not downloaded: get it from https://github.com/zhangzilongc/MMR, and unpack it so that "
    f"`root` holds the folder {SUBSET}."
)


class AeBADDataset(MaskedImageDataset):
    """One split of AeBAD-S.

    Items are :class:`~anomalib_pack.data.GroupedImageItem` with the domain as ``group``: ``background``,
    ``illumination``, ``same`` or ``view``. Normal images have it too, because each domain has its own.

    Args:
        root: Folder of the data set, which holds the folder ``AeBAD_S``. With ``None``, Anomalib's datasets folder.
        augmentations: Applied to image and mask together.
        split: ``"train"`` or ``"test"``.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.

    Raises:
        FileNotFoundError: If the folder of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no mask or several.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        augmentations: Transform | None = None,
        split: str | Split = Split.TRAIN,
        white_level: float | None = None,
    ) -> None:
        super().__init__(augmentations, white_level)
        self.samples = make_dataset(resolve_dataset_root(root, "AeBAD") / SUBSET, split)


def make_dataset(root: Path, split: str | Split) -> DataFrame:
    """List the images of a split.

    Args:
        root: The folder ``AeBAD_S``.
        split: ``"train"`` or ``"test"``.

    Returns:
        One row per image with the columns that Anomalib's datasets have and ``group``, the domain.

    Raises:
        FileNotFoundError: If the folder of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no mask or several.
    """
    samples = make_mvtec_samples(root, split, IMG_EXTENSIONS, REMEDY, levels="*/*")
    samples["group"] = [Path(path).parent.name for path in samples["image_path"]]
    return samples


class AeBAD(MVTecLayout, AnomalibDataModule):
    """AeBAD-S with the domains as groups, by which :class:`~anomalib_pack.metrics.GroupEvaluator` reports metrics.

    The data set has no validation images. By default a tenth of the training images are held back, all of them normal,
    so that no threshold is chosen on test labels.

    Anomalies can lie at the border, where a model's pre-processor crops them away. Anomalous images of whose mask
    nothing is left are named in a warning at the end of a run, by each process of several for its own.

    Args:
        root: Folder of the data set, which holds the folder ``AeBAD_S``. With ``None``, Anomalib's datasets folder.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers per data loader.
        train_augmentations: Applied to training images.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where the split has none of its own.
        test_split_mode: How the test set is made.
        test_split_ratio: Share of the images that a split for testing takes.
        val_split_mode: How the validation set is made: ``"from_train"``, ``"from_test"``, ``"same_as_test"``,
            ``"synthetic"`` or ``"none"``. The last leaves scores raw and sets no threshold.
        val_split_ratio: Share of the images that a split for validation takes; ours, about 50.
        seed: Seed of random splits.
        vanished_as_normal: Anomalous images of whose mask nothing is left count as normal, as in the published
            evaluation of Zhang et al.; otherwise they stay anomalous, with an empty mask.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.

    Raises:
        ValueError: If ``val_split_mode`` is none of these, or ``white_level`` is not above 0.

    Example:
        >>> datamodule = AeBAD(root="./datasets/AeBAD", eval_batch_size=8)
        >>> datamodule.name
        'AeBAD_S'
    """

    remedy = REMEDY

    def __init__(
        self,
        root: Path | str | None = "./datasets/AeBAD",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.1,
        seed: int | None = None,
        vanished_as_normal: bool = False,
        white_level: float | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
            white_level=white_level,
        )
        self.root = resolve_dataset_root(root, "AeBAD")
        self.vanished_as_normal = vanished_as_normal

    @property
    def name(self) -> str:
        """Name of the folder that all images lie below, whatever ``root`` is called.

        Anomalib keeps what follows it of an image's path in the path of the result picture. Without it, only the domain
        would be kept, and pictures of a defect would overwrite those of another.
        """
        return SUBSET

    @property
    def _image_root(self) -> str:
        return str(self.folder)

    @property
    def folder(self) -> Path:
        """The folder ``AeBAD_S``."""
        return self.root / SUBSET

    def read(self, split: Split) -> AeBADDataset:
        """List the images of a split."""
        return AeBADDataset(self.root, split=split, white_level=self.white_level)
