"""Defects that cannot be told apart as MVTec LOCO's evaluation does."""

from collections.abc import Callable

from anomalib.data import AnomalibDataModule

from anomalib_pack.data.first_look import anomalous, datasets
from anomalib_pack.defect import Defect


def defect_errors(datamodule: AnomalibDataModule) -> tuple[list[str], list[str]]:
    """Read the defects of all anomalous images, where the data set tells them.

    Returns:
        What is wrong, and what is missing for sPRO, without which all else works.
    """
    errors = [
        _error(read, path)
        for dataset in datasets(datamodule).values()
        if (read := getattr(dataset, "defects", None)) is not None
        for path in anomalous(dataset).image_path
    ]
    missing = dict.fromkeys(str(error) for error in errors if isinstance(error, FileNotFoundError))
    wrong = dict.fromkeys(str(error) for error in errors if error is not None)
    return [message for message in wrong if message not in missing], list(missing)


def _error(read: Callable[[str], list[Defect]], path: str) -> Exception | None:
    try:
        read(path)
    except (OSError, ValueError) as error:
        return error
    return None
