"""Where categories come from: the folders of a data set that an Anomalib datamodule reads, or ``Folder`` datamodules.

Both kinds of source say the same: the folder below which all images lie, one datamodule per category, and the folders
of a category as the user knows them.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anomalib.data
from anomalib.data import AnomalibDataModule, Folder, RealIAD, Visa
from anomalib.data.datamodules.base import AnomalibVideoDataModule
from anomalib.data.datasets.image.autovi import CATEGORIES as AUTOVI_CATEGORIES
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.data.utils.path import contains_non_printable_characters

from anomalib_pack.rendering.writing import SCENES

# Depth images have no place in a batch of images; Kaputt keeps its categories in tables, not in folders.
UNUSABLE = {"ADAM3D", "Kaputt", "MVTec3D"}

# Datamodules whose prepare_data gets one category only; that of all others gets the whole data set.
SINGLY_PREPARED = {"AutoVI": AUTOVI_CATEGORIES, "SyntheticLoco": tuple(SCENES)}

ONLY_ASCII = "Anomalib reads no folder with other characters than those of ASCII in its path"

# Arguments of ``Folder`` that name folders.
FOLDERS = ("normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir")


class DatasetCategories:
    """Categories of a data set for which there is a datamodule of one category.

    Args:
        dataset: Name of the datamodule.
        root: Folder of the data set; None means the datamodule's default.
        categories: Names, or ``"all"`` for those that are there.
        arguments: Further arguments of the datamodule.

    Raises:
        ValueError: If there is no such datamodule, it does not take an argument, or ``categories`` are no names.
    """

    def __init__(
        self, dataset: str, root: str | Path | None, categories: Sequence[str] | str, arguments: Mapping[str, Any]
    ) -> None:
        self._class = _datamodule_class(dataset)
        self._dataset = dataset
        self._categories = categories if categories == "all" else _checked_names("categories", categories)
        self._arguments = dict(arguments)
        # The base class splits by a ratio, also where a datamodule has no argument for it, as RealIAD.
        self._ratios = {name: self._arguments.pop(name) for name in _ratios_without_argument(self._class, arguments)}
        for name in self._arguments.keys() - _parameters(self._class):
            msg = f"{name} is no argument of {dataset}, which has {', '.join(_parameters(self._class))}."
            raise ValueError(msg)
        if root is None:
            root = self._class(**self._arguments).root
        # Anomalib resolves symbolic links in some datamodules only. Without any, all images lie below this path.
        self.root = os.path.realpath(root)

    def prepare_data(self) -> None:
        """Get the data set where there is none, and let the datamodule of each category do what it does.

        Raises:
            ValueError: If there are no categories in a folder that holds other files. Nothing is downloaded then.
        """
        if self._dataset not in SINGLY_PREPARED and not self._found():
            datamodule = self._datamodule()
            _check_downloadable(datamodule)
            datamodule.prepare_data()
        for datamodule in self.datamodules().values():
            datamodule.prepare_data()

    def datamodules(self) -> dict[str, AnomalibDataModule]:
        """Return a new datamodule for each category.

        Raises:
            ValueError: If a category is not there, or there is none.
        """
        found = self._found()
        known = SINGLY_PREPARED.get(self._dataset, ())
        folder = _categories_folder(self._datamodule())
        names = (found or known) if self._categories == "all" else self._categories
        if not names:
            msg = f"There are no categories of {self._dataset} in {folder}. Check `root`, or call prepare_data()."
            raise ValueError(msg)
        available = sorted({*found, *known})
        missing = [name for name in names if name not in available]
        if missing:
            msg = f"categories must be among those in {folder}: {', '.join(available)}; got {', '.join(missing)}."
            raise ValueError(msg)
        return {name: self._datamodule(category=name) for name in names}

    def folders(self, category: str) -> list[str]:
        """Return the folder of a category."""
        return [str(_categories_folder(self._datamodule()) / category)]

    def _found(self) -> list[str]:
        return _find_categories(self._datamodule())

    def _datamodule(self, **category: str) -> AnomalibDataModule:
        datamodule = self._class(**{"root": self.root, **category, **self._arguments})
        for name, ratio in self._ratios.items():
            setattr(datamodule, name, ratio)
        return datamodule


class FolderCategories:
    """Categories that are read by ``Folder`` datamodules of their own, each with the name of its datamodule.

    Args:
        folders: The datamodules, or their configurations: mappings with ``class_path`` and ``init_args``.
        splits: Split modes, ratios and seed that all of them get.

    Raises:
        ValueError: If something else is in the list, names are equal, or the images have no folder in common.
    """

    def __init__(self, folders: Sequence[Folder | Mapping], splits: Mapping[str, Any]) -> None:
        datamodules = [_folder_datamodule(entry) for entry in folders]
        names = _checked_names("dataset", [datamodule.name for datamodule in datamodules])
        self._datamodules = dict(zip(names, datamodules, strict=True))
        for datamodule in self._datamodules.values():
            for argument, value in splits.items():
                enum = {"test_split_mode": TestSplitMode, "val_split_mode": ValSplitMode}.get(argument)
                setattr(datamodule, argument, enum(value) if enum else value)
        self.root = _common_folder([folder for name in names for folder in self.folders(name)])

    def prepare_data(self) -> None:
        """Nothing is to be got."""

    def datamodules(self) -> dict[str, AnomalibDataModule]:
        """Return the datamodule of each category."""
        return dict(self._datamodules)

    def folders(self, category: str) -> list[str]:
        """Return the folders with images of a category, normal and anomalous."""
        datamodule = self._datamodules[category]
        return [path for name in FOLDERS if name != "mask_dir" for path in _absolute_paths(datamodule, name)]


@contextmanager
def with_readable_names(datamodule: AnomalibDataModule) -> Iterator[None]:
    """Let ``Folder`` list folders with names beyond ASCII.

    Anomalib refuses such paths, but looks at their characters before it follows links: here it gets links without any,
    and lists the files below the folders themselves.

    Raises:
        ValueError: If no such link can be made, or another datamodule refuses such names; the message has the folder.
    """
    if not isinstance(datamodule, Folder):
        with refusal_explained():
            yield
        return
    given = {name: getattr(datamodule, name) for name in ("root", *FOLDERS)}
    paths = {name: _absolute_paths(datamodule, name) for name in given if name in FOLDERS}
    unreadable = [path for several in paths.values() for path in several if contains_non_printable_characters(path)]
    if not unreadable:
        yield
        return
    with TemporaryDirectory() as temporary:
        try:
            links = {name: _linked(several, Path(temporary), name) for name, several in paths.items()}
        except OSError as error:
            msg = (
                f"{ONLY_ASCII}, and no link around them can be made ({error}): {', '.join(unreadable)}. Rename the "
                "folder."
            )
            raise ValueError(msg) from error
        try:
            for name, value in {**links, "root": None}.items():
                setattr(datamodule, name, value or None)
            yield
        finally:
            for name, value in given.items():
                setattr(datamodule, name, value)


@contextmanager
def refusal_explained() -> Iterator[None]:
    """Say what is wrong with a name that Anomalib refuses as not printable.

    Raises:
        ValueError: Instead of Anomalib's; the message has its path.
    """
    try:
        yield
    except ValueError as error:
        if "non-printable" not in str(error):
            raise
        msg = f"{ONLY_ASCII}: {error}. Rename the folder, or move the data set out of it."
        raise ValueError(msg) from error


def _linked(paths: Sequence[str], folder: Path, name: str) -> list[Path]:
    links = [folder / f"{name}_{number}" for number, _ in enumerate(paths)]
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path, target_is_directory=True)
    if any(map(contains_non_printable_characters, links)):
        msg = f"the folder for temporary files, {folder}, has such characters too"
        raise OSError(msg)
    return links


def _absolute_paths(datamodule: Folder, name: str) -> list[str]:
    """Absolute paths of a folder argument, which is one path, several or None."""
    value = getattr(datamodule, name)
    paths = [value] if isinstance(value, str | os.PathLike) else value or []
    # As Path.resolve, but without following the links by which the user has named the folders.
    return [os.path.abspath(Path(datamodule.root or "", path)) for path in paths]  # noqa: PTH100


def _find_categories(datamodule: AnomalibDataModule) -> list[str]:
    """Return the names of the categories that are there, in order.

    A category is a folder with a folder ``train`` in it. Real-IAD lists the images of a category in a file instead:
    there it is a folder for which there is such a file.
    """
    folder = _categories_folder(datamodule)
    if not folder.is_dir():
        return []
    if isinstance(datamodule, RealIAD):
        pattern = str(datamodule.json_path)
        return sorted(
            path.name for path in folder.iterdir() if (datamodule.root / pattern.format(category=path.name)).is_file()
        )
    return sorted(path.name for path in folder.iterdir() if (path / "train").is_dir())


def _categories_folder(datamodule: AnomalibDataModule) -> Path:
    """Folder that holds one folder per category."""
    if isinstance(datamodule, Visa):
        return datamodule.split_root
    if isinstance(datamodule, RealIAD):
        return datamodule.root / f"realiad_{datamodule.resolution}"
    return datamodule.root


def _check_downloadable(datamodule: AnomalibDataModule) -> None:
    """Keep a wrong path from starting a download of gigabytes into it."""
    root = datamodule.root
    # VisA without its split has the folder of a category, from which the datamodule makes what is missing.
    if root.is_dir() and any(root.iterdir()) and not (root / datamodule.category).is_dir():
        msg = (
            f"{root} holds files, but there are no categories in {_categories_folder(datamodule)} as {datamodule.name} "
            "has them. Correct `root`, or give a new or empty folder to get the data set into."
        )
        raise ValueError(msg)


def _datamodule_class(name: str) -> type[AnomalibDataModule]:
    usable = {
        key: value
        for key, value in vars(anomalib.data).items()
        if key not in UNUSABLE
        and inspect.isclass(value)
        and issubclass(value, AnomalibDataModule)
        and not issubclass(value, AnomalibVideoDataModule)
        and {"root", "category"} <= _parameters(value).keys()
    }
    if name not in usable:
        msg = f"dataset must be one of {', '.join(sorted(usable))}, or a list of Folder, got {name!r}."
        raise ValueError(msg)
    return usable[name]


def _parameters(datamodule: type[AnomalibDataModule]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(datamodule).parameters


def _ratios_without_argument(datamodule: type[AnomalibDataModule], arguments: Mapping[str, Any]) -> list[str]:
    """Names of the given ratios for which the datamodule has a split mode, but no argument."""
    known = _parameters(datamodule)
    return [
        f"{split}_split_ratio"
        for split in ("test", "val")
        if f"{split}_split_mode" in known and f"{split}_split_ratio" in arguments.keys() - known
    ]


def _folder_datamodule(entry: Folder | Mapping) -> Folder:
    # `anomalib benchmark` hands over configurations as they are.
    if isinstance(entry, Mapping) and str(entry.get("class_path", "")).split(".")[-1] == "Folder":
        arguments = entry.get("init_args", {})
        for name, value in arguments.items():
            if name.endswith("augmentations") and isinstance(value, Mapping):
                msg = f"{name} of a Folder must be transforms, not their configuration, got {value!r}."
                raise ValueError(msg)
        return Folder(**arguments)
    if not isinstance(entry, Folder):
        msg = f"dataset must be the name of a datamodule or a list of Folder, got {entry!r} in the list."
        raise ValueError(msg)  # noqa: TRY004  # as for all other arguments
    return entry


def _checked_names(argument: str, names: Sequence[str]) -> list[str]:
    """List of one or more different names."""
    if isinstance(names, str) or not names or not all(isinstance(name, str) and name for name in names):
        msg = f"{argument} must be 'all' or a list of names, got {names!r}. Numbers have to be quoted."
        raise ValueError(msg)
    if len(set(names)) < len(names):
        msg = f"{argument} must have different names, got {', '.join(names)}."
        raise ValueError(msg)
    return list(names)


def _common_folder(folders: Sequence[str]) -> str:
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # different drives
        common = ""
    if not Path(common).name:
        msg = (
            f"dataset must have a folder that holds all images, but {', '.join(folders)} have none in common. Result "
            "pictures are filed by the path below it. Make a folder with links to these folders, and give the links."
        )
        raise ValueError(msg)
    return common
