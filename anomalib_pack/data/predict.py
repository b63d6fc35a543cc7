"""Images without labels, read as those of the pack's datamodules."""

from collections.abc import Callable
from pathlib import Path

from anomalib.data import ImageBatch, ImageItem
from anomalib.data.utils.image import is_image_file
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Transform

from anomalib_pack.data.image_files import ReadsImages, check_white_level, read_image


class PredictImages(ReadsImages, Dataset):
    """Images to predict, in place of Anomalib's ``PredictDataset``.

    Images of more than 8 bits are read as in training, and folders may have any name.

    Args:
        path: An image or a folder, which is searched with all folders below it.
        transform: Applied to each image.
        white_level: The value that is white in images of more than 8 bits, as in training; None for the largest of the
            type.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no image in it.
        ValueError: If ``white_level`` is not above 0.
    """

    def __init__(self, path: str | Path, transform: Transform | None = None, white_level: float | None = None) -> None:
        self.white_level = check_white_level(white_level)
        path = Path(path)
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        self.image_filenames = [file for file in files if is_image_file(file)]
        if not self.image_filenames:
            msg = f"path must be an image or a folder with images, but there is none at {path}."
            raise FileNotFoundError(msg)
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_filenames)

    def __getitem__(self, index: int) -> ImageItem:
        """Read an image.

        Raises:
            OSError: If it cannot be read; the message names the file.
        """
        path = self.image_filenames[index]
        image = read_image(path, self.white_level)
        if self.transform:
            image = self.transform(image)
        return ImageItem(image=image, image_path=str(path))

    @property
    def collate_fn(self) -> Callable:
        """The collate function of Anomalib's images."""
        return ImageBatch.collate
