"""A rendered data set with logical and structural anomalies, in the folder format of MVTec LOCO.

For demos, tests and a first look at a model, without a download and without a licence question.
"""

import json
from pathlib import Path

from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.mvtec_loco import MVTecLoco
from anomalib_pack.files import new_folder
from anomalib_pack.rendering.writing import LOGICAL, RENDERING, SCENES, STRUCTURAL, write_category


class SyntheticLoco(MVTecLoco):
    """Rendered trays of parts and wired boards, with logical and structural anomalies.

    ``prepare_data`` renders the category into ``root`` where it is missing: the same parameters and library versions
    give the same files, byte by byte. The parameters are kept in ``<root>/<category>/info.json``; a folder rendered
    with others is never overwritten. The remaining arguments are those of :class:`MVTecLoco`.

    Args:
        root: Folder of the data set. With ``None``, Anomalib's datasets folder.
        category: ``"tray"`` (an assembly kit in six compartments) or ``"board"`` (terminals joined by wires).
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
        image_size: Side of the square images in pixels, at least 64; or height and width, which must be equal.
        num_train: Number of training images, all normal.
        num_val: Number of validation images, all normal.
        num_test: Number of test images of each kind: normal, logical anomalies, structural anomalies.
        render_seed: Seed of the rendering.

    Raises:
        ValueError: If the category is unknown or a number is out of range.

    Example:
        >>> datamodule = SyntheticLoco(category="tray", num_train=60)
        >>> datamodule.num_train, datamodule.image_size
        (60, 256)
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/SyntheticLoco",
        category: str = "tray",
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
        image_size: int | tuple[int, int] = 256,
        num_train: int = 120,
        num_val: int = 30,
        num_test: int = 30,
        render_seed: int = 0,
    ) -> None:
        super().__init__(
            root=resolve_dataset_root(root, "SyntheticLoco"),
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
        if category not in SCENES:
            msg = f"category must be one of {', '.join(SCENES)}, got {category!r}."
            raise ValueError(msg)
        if isinstance(image_size, tuple):  # what Anomalib's get_datamodule makes of every image_size
            if image_size[0] != image_size[1]:
                msg = f"image_size must be one side or two equal ones, got {image_size}."
                raise ValueError(msg)
            image_size = image_size[0]
        for name, value, least in (
            ("image_size", image_size, 64),
            ("num_train", num_train, 1),
            ("num_val", num_val, 1),
            ("num_test", num_test, 1),
            ("render_seed", render_seed, 0),
        ):
            if value < least:
                msg = f"{name} must be at least {least}, got {value}."
                raise ValueError(msg)
        self.image_size = image_size
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self.render_seed = render_seed

    def prepare_data(self) -> None:
        """Render the category where it is missing.

        The files appear under their final name only when all are written, so a rendering that was killed is done anew
        (what it left is a hidden folder in ``root``, ``.writing-*``, which may be deleted).

        Raises:
            ValueError: If ``<root>/<category>`` was rendered with other parameters, or is no rendering at all.
        """
        folder = self.root / self.category
        if not folder.exists():
            with new_folder(folder) as rendered:
                write_category(rendered, self.category, self.image_size, self._images_of_groups, self.render_seed)
                (rendered / "info.json").write_text(json.dumps(self._parameters, indent=2))
        self._check_parameters(folder)  # also of a folder that another process has just made

    @property
    def _images_of_groups(self) -> dict[tuple[str, str], int]:
        """How many images each folder of each split has, in the order in which they are rendered."""
        return {
            ("train", "good"): self.num_train,
            ("validation", "good"): self.num_val,
            ("test", "good"): self.num_test,
            ("test", LOGICAL): self.num_test,
            ("test", STRUCTURAL): self.num_test,
        }

    @property
    def _parameters(self) -> dict[str, str | int]:
        return {
            "category": self.category,
            "image_size": self.image_size,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "render_seed": self.render_seed,
            "rendering": RENDERING,
        }

    def _check_parameters(self, folder: Path) -> None:
        info = folder / "info.json"
        if not info.is_file():
            msg = f"{folder} was not rendered by SyntheticLoco: it has no info.json. Give another `root`."
            raise ValueError(msg)
        found = json.loads(info.read_text())
        if found != self._parameters:
            msg = (
                f"{folder} was rendered with {found}, but {self._parameters} are asked for. "
                "Give another `root`, or delete that folder to have it rendered anew."
            )
            raise ValueError(msg)
