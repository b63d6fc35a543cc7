from anomalib.data import Folder


class AcmeData(Folder):
    """A datamodule of a third party."""
