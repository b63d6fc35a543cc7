"""`python -m anomalib_pack check` names each fault and its file, and its exit status says whether there is an error."""

import shutil
import sys

import numpy as np
import pytest
from image_folders import turned, write, write_folder, write_goods
from PIL import Image

from anomalib_pack.__main__ import main

FOLDERS = ("normal_dir", "good", "abnormal_dir", "bad", "normal_test_dir", "fine", "mask_dir", "masks")


@pytest.fixture
def check(monkeypatch, capsys):
    """Run the command; returns its exit status and lines."""

    def run(data, **arguments):
        words = [word for name, value in arguments.items() for word in (f"--data.{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["anomalib_pack", "check", "--data", data, *words])
        return main(), capsys.readouterr().out.splitlines()

    return run


def check_folder(check, root):
    arguments = dict(zip(FOLDERS[::2], FOLDERS[1::2], strict=True))
    return check("Folder", name="part", root=root, val_split_mode="same_as_test", **arguments)


def test_nothing_is_wrong(check, rendered):
    """Groups are those of the data set; values of masks are kinds of defects there."""
    status, lines = check("MVTecLoco", root=rendered, category="tray")
    assert status == 0
    table = [line.split() for line in lines[1:-2]]
    assert [row[:6] for row in table] == [
        ["tray", "train", "good", "4", "0", "0"],
        ["tray", "val", "good", "2", "0", "0"],
        ["tray", "test", "good", "4", "0", "0"],
        ["tray", "test", "logical_anomalies", "4", "4", table[3][5]],
        ["tray", "test", "structural_anomalies", "4", "4", table[4][5]],
    ]
    masks = len(list(rendered.glob("tray/ground_truth/*/*/*.png")))
    assert int(table[3][5]) + int(table[4][5]) == masks
    assert {tuple(row[6:]) for row in table} == {("64", "x", "64", "8", "RGB")}
    assert lines[-1] == f"files: {18 + masks}, errors: 0, warnings: 0"


def test_what_is_missing_is_rendered(check, tmp_path):
    """Nobody can download it; a rendering with other parameters is an error as in a training."""
    small = {"root": tmp_path, "image_size": 64, "num_train": 1, "num_val": 1, "num_test": 1}
    assert check("SyntheticLoco", **small)[0] == 0
    status, lines = check("SyntheticLoco", **small, render_seed=1)
    assert status == 1
    assert lines[0].startswith(f"ERROR    {tmp_path}/tray was rendered with ")


def test_defects_that_cannot_be_told_apart(check, rendered, tmp_path):
    """Training needs no configuration, but sPRO does; a mask that it does not explain is an error."""
    shutil.copytree(rendered / "tray", tmp_path / "tray")
    mask = next(tmp_path.glob("tray/ground_truth/logical_anomalies/001/*.png"))
    Image.fromarray((np.asarray(Image.open(mask)) > 0) * np.uint8(7)).save(mask)
    status, lines = check("MVTecLoco", root=tmp_path, category="tray")
    assert status == 1
    assert lines[0].startswith(f"ERROR    The mask {mask} has pixel value 7, but {tmp_path}/tray/defects_config.json")
    (tmp_path / "tray" / "defects_config.json").unlink()
    status, lines = check("MVTecLoco", root=tmp_path, category="tray")
    assert status == 0
    assert lines[0].startswith(f"WARNING  not all there (1): There is no file {tmp_path}/tray/defects_config.json")


def fault_unreadable(root):
    (root / "good" / "0.png").write_bytes(b"")
    return f"Cannot read {root}/good/0.png: the file has 0 bytes."


def fault_orientation(root):
    turned(root / "fine" / "0.png", np.asarray(Image.open(root / "fine" / "0.png")), 6)
    return f"Cannot read {root}/fine/0.png: its EXIF orientation is 6"


def fault_bits(root):
    write(root / "good" / "1.png", np.full((32, 32), 4095, np.uint16) * np.eye(32, dtype=np.uint16))
    return f"Cannot read {root}/good/1.png: it has 16 bits per channel, which Anomalib's reader clips"


def fault_empty_mask(root):
    write(root / "masks" / "1.png", np.zeros((32, 32), np.uint8))
    return f"The mask {root}/masks/1.png of the anomalous image {root}/bad/1.png is empty"


def fault_mask_size(root):
    write(root / "masks" / "1.png", np.full((16, 32), 255, np.uint8))
    return f"The mask {root}/masks/1.png has size (16, 32)"


def fault_leak(root):
    shutil.copy(root / "good" / "2.png", root / "fine" / "2.png")
    return f"The test image {root}/fine/2.png is the training image {root}/good/2.png"


def fault_listing(root):
    shutil.rmtree(root / "good")
    return f"Path does not exist: {root}/good"


ERRORS = [
    fault_unreadable,
    fault_orientation,
    fault_bits,
    fault_empty_mask,
    fault_mask_size,
    fault_leak,
    fault_listing,
]


@pytest.mark.parametrize("fault", ERRORS)
def test_errors_come_first_and_name_the_file(check, tmp_path, fault):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    message = fault(root)
    status, lines = check_folder(check, root)
    assert status == 1
    assert lines[0].startswith(f"ERROR    {message}")
    assert not lines[1].startswith("ERROR")
    assert "errors: 1" in lines[-1]


def test_all_errors_are_said(check, tmp_path):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    faults = [fault(root) for fault in ERRORS if fault not in (fault_mask_size, fault_listing)]
    lines = check_folder(check, root)[1]
    for fault in faults:
        assert sum(line.startswith(f"ERROR    {fault}") for line in lines) == 1
    assert f"errors: {len(faults)}" in lines[-1]


def test_warnings(check, tmp_path):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    write(root / "good" / "0.png", np.full((32, 32), 7, np.uint8))
    shutil.copy(root / "good" / "1.png", root / "good" / "2.png")
    write(root / "good" / "more.gif", np.eye(4, dtype=np.uint8))
    soft = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)
    write(root / "masks" / "0.png", soft)
    status, lines = check_folder(check, root)
    assert status == 0
    assert [line for line in lines if line.startswith("WARNING")] == [
        f"WARNING  images of one colour everywhere (1): {root}/good/0.png",
        f"WARNING  masks with more than 8 different values (1): {root}/masks/0.png",
        f"WARNING  images of a kind that is not read, left out (1): {root}/good/more.gif",
        f"WARNING  equal files (1): {root}/good/2.png = {root}/good/1.png",
    ]


def test_the_packs_own_reading(check, tmp_path):
    """Images of 16 bits are a warning for Anomalib's inferencers, and an error if they are whiter than white."""
    datamodule = write_goods(tmp_path, np.full((32, 32), 255, np.uint8))
    for index, path in enumerate(sorted((tmp_path / "can").rglob("*/good/*.png"))):
        write(path, np.random.default_rng(index).integers(0, 4096, (32, 32), dtype=np.uint16))
    status, lines = check("GoodsAD", root=tmp_path, category="can", white_level=4095)
    assert (status, lines[0].split(":")[0]) == (
        0,
        "WARNING  images of more than 8 bits, which Anomalib's inferencers and pictures clip (6)",
    )
    status, lines = check("GoodsAD", root=tmp_path, category="can", white_level=100)
    assert status == 1
    assert sum("not 0 to 100: give what is white as white_level" in line for line in lines) == 6
    assert datamodule.category == "can"


def test_category_without_anomalies(check, tmp_path):
    write_goods(tmp_path / "goods", np.full((32, 32), 255, np.uint8))
    root = tmp_path / "goods"
    shutil.copytree(root / "can", root / "jar")
    for path in (root / "jar" / "train" / "good").iterdir():
        write(path, np.random.default_rng(9).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    shutil.rmtree(root / "jar" / "test" / "opened")
    lines = check("MultiCategory", dataset="GoodsAD", root=root)[1]
    assert "WARNING  not all there (1): jar has no anomalous test images" in lines
