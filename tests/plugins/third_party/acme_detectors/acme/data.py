"""The data: folders of images, as they come from the line."""

from anomalib.data import Folder


class AcmeData(Folder):
    """A datamodule of a third party."""
