"""MVTecLoco reads what SyntheticLoco renders, names what is wrong, and never downloads into the wrong folder."""

import shutil

import numpy as np
import pytest
import torch
from anomalib.data import MVTecLOCO
from anomalib.data.datasets.image.mvtec_loco import DOWNLOAD_INFO
from anomalib.data.utils import Split
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_pack.data import GroupedImageBatch, GroupedImageItem, MVTecLoco, MVTecLocoDataset
from anomalib_pack.data import mvtec_loco as module

MODES = ["from_dir", "none", "from_train", "from_test", "same_as_test", "synthetic"]


@pytest.fixture
def copy(rendered, tmp_path):
    """A rendering that the test may damage."""
    shutil.copytree(rendered / "tray", tmp_path / "root" / "tray")
    return tmp_path / "root"


@pytest.fixture
def downloads(monkeypatch):
    """The roots that would have been downloaded into: the network is the one thing replaced here."""
    roots = []
    monkeypatch.setattr(module, "download_and_extract", lambda root, _info: roots.append(root))
    return roots


def make_datamodule(root, **arguments):
    return MVTecLoco(root=root, category="tray", num_workers=0, eval_batch_size=5, **arguments)


def test_arguments_and_defaults_are_those_of_anomalib(tmp_path):
    ours, theirs = MVTecLoco(root=tmp_path), MVTecLOCO(root=tmp_path)
    shared = set(vars(theirs)) - {"_log_hyperparams", "_hparams_name"}
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}


@pytest.mark.parametrize(("split", "count"), [("train", 4), ("val", 2), (Split.TEST, 12), (None, 18)])
def test_splits(rendered, split, count):
    dataset = MVTecLocoDataset(rendered, "tray", split=split)
    assert len(dataset) == count
    assert dataset.task == "segmentation"
    assert (dataset.samples.group == "").sum() == (dataset.samples.label == "good").sum()


def test_test_items_have_group_label_and_mask(rendered):
    for item in MVTecLocoDataset(rendered, "board", split="test"):
        folder = item.image_path.split("/")[-2]
        assert isinstance(item, GroupedImageItem)
        assert item.group == ("" if folder == "good" else folder)
        assert item.gt_label == (folder != "good")
        assert item.gt_mask.any() == (folder != "good")
        assert item.image.shape == (3, 64, 64)


def test_masks_of_an_image_are_united(copy):
    folder = copy / "tray" / "ground_truth" / "logical_anomalies" / "000"
    shutil.rmtree(folder)
    folder.mkdir()
    corners = np.zeros((2, 64, 64), np.uint8)
    corners[0, :8, :8] = 255
    corners[1, 4:16, :8] = 251
    for index, corner in enumerate(corners):
        Image.fromarray(corner).save(folder / f"{index:03}.png")
    item = next(item for item in MVTecLocoDataset(copy, "tray", split="test") if item.group == "logical_anomalies")
    assert item.mask_path == str(folder)
    assert torch.equal(item.gt_mask, torch.from_numpy(corners.any(0)))


def test_augmentations_move_image_and_mask_together(rendered):
    plain = MVTecLocoDataset(rendered, "tray", split="test")
    flipped = MVTecLocoDataset(rendered, "tray", RandomHorizontalFlip(1.0), "test")
    for before, after in zip(plain, flipped, strict=True):
        assert torch.equal(before.image.flip(-1), after.image)
        assert torch.equal(before.gt_mask.flip(-1), after.gt_mask)


@pytest.mark.parametrize("mode", MODES)
def test_validation_split_modes(rendered, mode):
    datamodule = make_datamodule(rendered, val_split_mode=mode, val_split_ratio=0.5, seed=1)
    datamodule.setup()
    sizes = len(datamodule.train_data), len(datamodule.val_data), len(datamodule.test_data)
    assert (
        sizes
        == {
            "from_dir": (4, 2, 12),
            "none": (4, 2, 12),
            "from_train": (2, 2, 12),
            "from_test": (4, 6, 6),
            "same_as_test": (4, 12, 12),
            "synthetic": (2, 2, 12),
        }[mode]
    )
    batches = list(datamodule.test_dataloader())
    assert all(isinstance(batch, GroupedImageBatch) for batch in batches)
    assert {group for batch in batches for group in batch.group} == {"", "logical_anomalies", "structural_anomalies"}


@pytest.mark.parametrize("mode", MODES[2:])
def test_validation_folder_is_needed_only_where_it_is_used(copy, mode):
    shutil.rmtree(copy / "tray" / "validation")
    make_datamodule(copy, val_split_mode=mode).setup()
    with pytest.raises(FileNotFoundError, match=r"tray/validation"):
        make_datamodule(copy).setup()


@pytest.mark.parametrize("mode", ["none", "synthetic"])
def test_test_split_modes(rendered, mode):
    datamodule = make_datamodule(rendered, test_split_mode=mode)
    datamodule.setup()
    assert len(datamodule.test_data) == {"none": 8, "synthetic": 4}[mode]


def test_missing_category_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/juice_bottle/train"):
        MVTecLoco(root=tmp_path, category="juice_bottle").setup()


def test_empty_split_names_the_folder(copy):
    for path in (copy / "tray" / "train" / "good").iterdir():
        path.rename(path.with_suffix(".JPG"))
    with pytest.raises(RuntimeError, match=r"no images in .*/tray/train/\*/: .*\.png"):
        make_datamodule(copy).setup()


def test_missing_masks_name_image_and_folder(copy):
    shutil.rmtree(copy / "tray" / "ground_truth" / "structural_anomalies" / "001")
    with pytest.raises(
        RuntimeError, match=r"test/structural_anomalies/001.png .*ground_truth/structural_anomalies/001 "
    ):
        make_datamodule(copy).setup()


@pytest.mark.parametrize("place", ["test/logical_anomalies/000.png", "ground_truth/logical_anomalies/000/000.png"])
@pytest.mark.parametrize("length", [0, 60])
def test_broken_file_is_named(copy, place, length):
    path = copy / "tray" / place
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(OSError, match=f"Cannot read .*/{place}: .* Replace"):
        list(MVTecLocoDataset(copy, "tray", split="test"))


def test_mask_of_another_size_is_named(copy):
    path = copy / "tray" / "ground_truth" / "logical_anomalies" / "000" / "000.png"
    Image.new("L", (32, 64), 255).save(path)
    with pytest.raises(ValueError, match=r"000/000.png has size \(64, 32\) .* \(64, 64\)"):
        list(MVTecLocoDataset(copy, "tray", split="test"))


def test_downloads_into_new_or_empty_root_only(tmp_path, downloads):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        MVTecLoco(root=tmp_path / name).prepare_data()
    assert downloads == [tmp_path / "new", tmp_path / "empty"]


def test_does_not_download_what_is_there(copy, downloads):
    make_datamodule(copy).prepare_data()
    assert downloads == []


@pytest.mark.parametrize(
    ("files", "category", "message"),
    [
        (["tray/train/good/000.png"], "juice_bottle", "no category 'juice_bottle' in .*; found there: tray"),
        (["photos/cat.png"], "juice_bottle", "holds files, but no category"),
        ([], "jiuce_bottle", "'jiuce_bottle' is not a category of MVTec LOCO, which has breakfast_box, juice_bottle"),
    ],
)
def test_wrong_root_or_category_downloads_nothing(tmp_path, downloads, files, category, message):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=message):
        MVTecLoco(root=tmp_path, category=category).prepare_data()
    assert downloads == []


def test_incomplete_archive_is_named(tmp_path, downloads):
    archive = tmp_path / DOWNLOAD_INFO.url.rsplit("/", 1)[-1]
    archive.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=f"{archive.name} is not the complete archive .* Delete it"):
        MVTecLoco(root=tmp_path).prepare_data()
    assert downloads == []
