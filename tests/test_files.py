"""Folders of results."""

from datetime import datetime
from pathlib import Path

import pytest

from anomalib_pack import files
from anomalib_pack.files import dated_folder


@pytest.fixture
def a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still."""

    class Clock(datetime):
        @classmethod
        def now(cls) -> datetime:
            return datetime(2024, 2, 29, 23, 59, 58)

    monkeypatch.setattr(files, "datetime", Clock)


@pytest.mark.usefixtures("a_moment")
def test_two_folders_of_one_second(tmp_path: Path) -> None:
    folders = [dated_folder(tmp_path / "runs") for _ in range(3)]
    assert [folder.name for folder in folders] == [
        "2024-02-29-23_59_58",
        "2024-02-29-23_59_58_2",
        "2024-02-29-23_59_58_3",
    ]
    assert max(folders) == folders[-1]  # the latest, as names are compared
    assert all(folder.is_dir() for folder in folders)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """An error, not one name after the other."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "disk that is gone")
    for parent in ("file", "link", "link/efficiency"):
        with pytest.raises(OSError, match=r"(File exists|Not a directory|No such file).*/(file|link)"):
            dated_folder(tmp_path / parent)
