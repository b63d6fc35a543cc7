"""A rendered data set with logical and structural anomalies, in the folder format of MVTec LOCO.

For demos, tests and a first look at a model, without a download and without a licence question.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from PIL import Image
from rich.progress import track
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.mvtec_loco import MVTecLoco
from anomalib_pack.rendering import board, tray

SCENES = {"tray": tray, "board": board}

# Raised whenever the same parameters give other pictures, so that results are never compared across renderings.
RENDERING = 1

LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"


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
        (what it left is a hidden folder in ``root``, ``.rendering-*``, which may be deleted).

        Raises:
            ValueError: If ``<root>/<category>`` was rendered with other parameters, or is no rendering at all.
        """
        folder = self.root / self.category
        if not folder.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.root, prefix=".rendering-") as temporary:
                rendered = Path(temporary) / self.category
                self._render(rendered)
                try:
                    rendered.rename(folder)
                except OSError:
                    # Another process may have been faster; the check below tells whether its folder will do.
                    if not folder.exists():
                        raise
        self._check_parameters(folder)

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

    def _render(self, folder: Path) -> None:
        """Write all files of the category into a new folder."""
        pixel_values = _write_defects_config(folder, SCENES[self.category], self.image_size)
        images = list(self._images())
        with ThreadPoolExecutor() as pool:
            jobs = pool.map(lambda job: self._render_image(folder, pixel_values, *job), enumerate(images))
            for _ in track(jobs, f"Rendering {self.category}", total=len(images)):
                pass
        (folder / "info.json").write_text(json.dumps(self._parameters, indent=2))

    def _render_image(
        self, folder: Path, pixel_values: dict[str, int], number: int, image_place: tuple[str, str, int]
    ) -> None:
        """Write an image and its masks."""
        split, group, index = image_place
        scene = SCENES[self.category]
        # Every image has a generator of its own: neither other images nor the global state have a say in it.
        rng = np.random.default_rng([self.render_seed, number])
        defects = [] if group == "good" else scene.draw_defects(group, rng)
        image, masks = scene.render(self.image_size, defects, rng)
        _write_png(folder / split / group / f"{index:03}.png", image)
        for mask_index, (defect, mask) in enumerate(zip(defects, masks, strict=True)):
            mask_path = folder / "ground_truth" / group / f"{index:03}" / f"{mask_index:03}.png"
            _write_png(mask_path, mask.astype(np.uint8) * np.uint8(pixel_values[defect]))

    def _images(self) -> Iterator[tuple[str, str, int]]:
        """Yield split folder, group folder and number of every image."""
        for split, group, count in (
            ("train", "good", self.num_train),
            ("validation", "good", self.num_val),
            ("test", "good", self.num_test),
            ("test", LOGICAL, self.num_test),
            ("test", STRUCTURAL, self.num_test),
        ):
            for index in range(count):
                yield split, group, index


def _write_defects_config(folder: Path, scene: ModuleType, image_size: int) -> dict[str, int]:
    """Write ``defects_config.json`` as MVTec LOCO has it; return the pixel value of each defect in the masks."""
    entries = [
        {
            "defect_name": defect.name,
            "pixel_value": 255 - index,
            # MVTec LOCO counts in pixels what is not relative to the mask.
            "saturation_threshold": defect.saturation if defect.relative else round(defect.saturation * image_size**2),
            "relative_saturation": defect.relative,
        }
        for index, defect in enumerate((*scene.LOGICAL_DEFECTS, *scene.STRUCTURAL_DEFECTS))
    ]
    folder.mkdir()
    (folder / "defects_config.json").write_text(json.dumps(entries, indent=4))
    return {entry["defect_name"]: entry["pixel_value"] for entry in entries}


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
