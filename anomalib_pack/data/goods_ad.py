"""GoodsAD: goods of a supermarket, six categories with products of many brands each.

Zhang, Ding, Ban, Dai: PKU-GoodsAD: A Supermarket Goods Dataset for Unsupervised Anomaly Detection and Segmentation,
IEEE Robotics and Automation Letters 9(3), 2024. Data: https://github.com/jianzhang96/GoodsAD. It has 6 124 images of
3000x3000 pixels.

The layout that is read is the published one, which is MVTec AD's but for JPEG images and the names of the masks::

    <root>/<category>/train/good/<name>.jpg
    <root>/<category>/test/good/<name>.jpg
    <root>/<category>/test/<type of defect>/<name>.jpg
    <root>/<category>/ground_truth/<type of defect>/<name>.png
"""

from pathlib import Path

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.masked import MaskedImageDataset
from anomalib_pack.data.mvtec_layout import MVTecLayout, make_mvtec_samples

CATEGORIES = ("cigarette_box", "drink_bottle", "drink_can", "food_bottle", "food_box", "food_package")

# JPEG as published; PNG for copies that were resized.
IMG_EXTENSIONS = (".jpg", ".JPG", ".png", ".PNG")

# For a folder that is missing.
REMEDY = (
    "Check `root` and `category`. GoodsAD is not downloaded: get it from https://github.com/jianzhang96/GoodsAD, and "
    f"unpack it so that `root` holds the folders {', '.join(CATEGORIES)}."
)


class GoodsADDataset(MaskedImageDataset):
    """One category of GoodsAD, or of any data set in its folder format.

    Items are :class:`~anomalib_pack.data.GroupedImageItem` without group.

    Args:
        root: Folder of the data set, which holds one folder per category. With ``None``, Anomalib's datasets folder.
        category: Folder of the category.
        augmentations: Applied to image and mask together.
        split: ``"train"`` or ``"test"``.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.

    Raises:
        FileNotFoundError: If the folder of the category or of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no mask or several.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        category: str = "cigarette_box",
        augmentations: Transform | None = None,
        split: str | Split = Split.TRAIN,
        white_level: float | None = None,
    ) -> None:
        super().__init__(augmentations, white_level)
        self.category = category
        root_category = resolve_dataset_root(root, "GoodsAD") / category
        self.samples = make_mvtec_samples(root_category, split, IMG_EXTENSIONS, REMEDY)


class GoodsAD(MVTecLayout, AnomalibDataModule):
    """One category of GoodsAD; :class:`~anomalib_pack.data.MultiCategory` joins several.

    The data set has no validation images. By default a tenth of the training images are held back, all of them normal,
    so that no threshold is chosen on test labels.

    Args:
        root: Folder of the data set, which holds one folder per category. With ``None``, Anomalib's datasets folder.
        category: ``"cigarette_box"``, ``"drink_bottle"``, ``"drink_can"``, ``"food_bottle"``, ``"food_box"`` or
            ``"food_package"``, or a folder of yours in the same format.
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
        val_split_ratio: Share of the images that a split for validation takes; ours, about 50 of a category.
        seed: Seed of random splits.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.

    Raises:
        ValueError: If ``val_split_mode`` is none of these, or ``white_level`` is not above 0.

    Example:
        >>> datamodule = GoodsAD(category="drink_can")
        >>> datamodule.name, datamodule.category
        ('GoodsAD', 'drink_can')
    """

    remedy = REMEDY

    def __init__(
        self,
        root: Path | str | None = "./datasets/GoodsAD",
        category: str = "cigarette_box",
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
        self.root = resolve_dataset_root(root, "GoodsAD")
        self.category = category

    @property
    def folder(self) -> Path:
        """Folder of the category."""
        return self.root / self.category

    def read(self, split: Split) -> GoodsADDataset:
        """List the images of a split."""
        return GoodsADDataset(self.root, self.category, split=split, white_level=self.white_level)
