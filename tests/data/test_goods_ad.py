"""GoodsAD reads the published layout, alone and joined, names what is wrong, and says where to get the data set."""

import inspect

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image
from tiny_model import TinyModel
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_pack.data import GoodsAD, GoodsADDataset, GroupedImageBatch, MultiCategory


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_category(folder, train=10):
    """JPEG images whose defects are bright, and their masks as PNG with the same stem."""
    counts = {"train/good": train, "test/good": 3, "test/opened": 2, "test/deformation": 3}
    for split, count in counts.items():
        for index in range(count):
            image, mask = np.full((32, 48, 3), 60, np.uint8), np.zeros((32, 48), np.uint8)
            if not split.endswith("good"):
                mask[index : index + 8, 4:20] = 255
                image[mask > 0] = 200
                write_image(folder / split.replace("test", "ground_truth") / f"{index:06}.png", mask)
            write_image(folder / split / f"{index:06}.jpg", image)


@pytest.fixture
def root(tmp_path):
    """Two categories with equal file names; the folder is not called as the data set."""
    for category, train in (("drink_can", 10), ("food_box", 6)):
        write_category(tmp_path / "goods" / category, train)
    return tmp_path / "goods"


def make_datamodule(root, **arguments):
    return GoodsAD(root, "drink_can", train_batch_size=4, eval_batch_size=4, num_workers=0, **arguments)


def test_arguments_are_those_of_anomalib():
    """The defaults that differ are the data set's, and keep test labels out of validation; one argument is more."""
    ours, theirs = ({k: v.default for k, v in inspect.signature(c).parameters.items()} for c in (GoodsAD, MVTecAD))
    assert list(ours) == [*theirs, "white_level"]
    assert ours.pop("white_level") is None
    different = {name: value for name, value in ours.items() if value != theirs[name]}
    assert different == {
        "root": "./datasets/GoodsAD",
        "category": "cigarette_box",
        "val_split_mode": "from_train",
        "val_split_ratio": 0.1,
    }


@pytest.mark.parametrize(("split", "labels"), [("train", {"good": 10}), ("test", {"good": 3, "opened": 2})])
def test_splits(root, split, labels):
    samples = GoodsADDataset(root, "drink_can", split=split).samples
    assert samples.label.value_counts().to_dict() == labels | ({"deformation": 3} if split == "test" else {})
    assert set(samples.split) == {split}


def test_each_defect_is_under_its_mask(root):
    dataset = GoodsADDataset(root, "drink_can", split="test")
    assert dataset.task == "segmentation"
    for item in dataset:
        is_good = item.image_path.split("/")[-2] == "good"
        assert item.gt_label == (not is_good)
        assert torch.equal(item.gt_mask.bool(), item.image.mean(0) > 0.5)
        assert item.mask_path == ("" if is_good else item.image_path.replace("/test/", "/ground_truth/")[:-3] + "png")
        assert item.group is None


def test_batches_have_no_groups(root):
    datamodule = make_datamodule(root)
    datamodule.setup()
    for batch in datamodule.test_dataloader():
        assert isinstance(batch, GroupedImageBatch)
        assert batch.group is None
        assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.tolist()


def test_augmentations_move_image_and_mask_together(root):
    plain = GoodsADDataset(root, "drink_can", split="test")
    flipped = GoodsADDataset(root, "drink_can", RandomHorizontalFlip(1.0), "test")
    for before, after in zip(plain, flipped, strict=True):
        assert torch.equal(before.image.flip(-1), after.image)
        assert torch.equal(before.gt_mask.flip(-1), after.gt_mask)


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("from_train", (6, 4, 8)),
        ("from_test", (10, 3, 5)),
        ("same_as_test", (10, 8, 8)),
        ("synthetic", (6, 4, 8)),
        ("none", (10, 0, 8)),
    ],
)
def test_validation_split_modes(root, mode, sizes):
    datamodule = make_datamodule(root, val_split_mode=mode, val_split_ratio=0.4, seed=1)
    datamodule.setup()
    loaders = datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()
    train, val, test = ({path for batch in loader for path in batch.image_path} for loader in loaders)
    assert (len(train), len(val), len(test)) == sizes
    assert not train & (val | test)
    assert mode == "same_as_test" or not val & test


def test_validation_is_normal_by_default(root):
    datamodule = make_datamodule(root)
    datamodule.setup()
    assert datamodule.val_data.has_normal
    assert not datamodule.val_data.has_anomalous
    assert (len(datamodule.train_data), len(datamodule.val_data), len(datamodule.test_data)) == (9, 1, 8)


def test_validation_folder_is_refused():
    with pytest.raises(ValueError, match=r"val_split_mode must be one of none, .* got from_dir: .* no validation"):
        GoodsAD(val_split_mode="from_dir")


@pytest.mark.parametrize("act", [GoodsAD.prepare_data, GoodsAD.setup])
def test_missing_data_set_says_where_to_get_it(tmp_path, act):
    with pytest.raises(
        FileNotFoundError,
        match=r"no folder .*/goods/food_box.* not downloaded: .*github.com/jianzhang96/GoodsAD, .*can,",
    ):
        act(GoodsAD(tmp_path / "goods", "food_box"))
    assert not (tmp_path / "goods").exists()


def test_data_set_that_is_there_is_left_alone(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_datamodule(root).prepare_data()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_split_without_images_is_named(root):
    for path in (root / "drink_can" / "train" / "good").iterdir():
        path.rename(path.with_suffix(".webp"))
    with pytest.raises(RuntimeError, match=r"no images in .*/drink_can/train/\*/: files named \*\.jpg or "):
        make_datamodule(root).setup()


@pytest.mark.parametrize(("masks", "count"), [([], 0), (["000001.png", "000001.PNG"], 2), (["000001_mask.png"], 0)])
def test_image_without_exactly_one_mask_is_named(root, masks, count):
    folder = root / "drink_can" / "ground_truth" / "opened"
    mask = (folder / "000001.png").read_bytes()
    (folder / "000001.png").unlink()
    for name in masks:
        (folder / name).write_bytes(mask)
    with pytest.raises(
        RuntimeError, match=f"test/opened/000001.jpg has {count} masks, .* one: {folder / '000001.png'}. Restore"
    ):
        make_datamodule(root).setup()


@pytest.mark.parametrize("place", ["test/opened/000000.jpg", "ground_truth/opened/000000.png"])
def test_broken_file_is_named(root, place):
    path = root / "drink_can" / place
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OSError, match=f"Cannot read {path}: .* Replace"):
        list(GoodsADDataset(root, "drink_can", split="test"))


def test_mask_of_another_size_is_named(root):
    path = root / "drink_can" / "ground_truth" / "opened" / "000000.png"
    write_image(path, np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match=rf"{path} has size \(32, 32\) .* \(32, 48\)"):
        list(GoodsADDataset(root, "drink_can", split="test"))


def make_engine(folder):
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=1, enable_progress_bar=False)


@pytest.mark.parametrize("mode", ["from_train", "none"])
def test_anomalib_trains_and_tests(root, tmp_path, mode):
    """Stock evaluator and pictures, with validation and without: one picture per test image."""
    datamodule = make_datamodule(root, val_split_mode=mode)
    metrics = make_engine(tmp_path).train(TinyModel(visualizer=True), datamodule=datamodule)[0]
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} == set(metrics)
    results = tmp_path / "TinyModel" / "GoodsAD" / "drink_can" / "v0" / "images"
    pictures = {path.parent.name + "/" + path.name for path in results.rglob("*.*")}
    assert pictures == {path.parent.name + "/" + path.name for path in root.glob("drink_can/test/*/*")}


def test_categories_for_one_model(root, tmp_path):
    datamodule = MultiCategory("GoodsAD", root, num_workers=0, seed=1, val_split_ratio=0.5)
    metrics = make_engine(tmp_path).train(TinyModel(visualizer=True), datamodule=datamodule)[0]
    assert {
        f"{name}_{end}" for name in ("image_AP", "pixel_AUPRO") for end in ("drink_can", "food_box", "mean")
    } <= set(metrics)
    assert datamodule.train_data.samples.group.value_counts().to_dict() == {"drink_can": 5, "food_box": 3}
    assert datamodule.val_data.samples.group.value_counts().to_dict() == {"drink_can": 5, "food_box": 3}
    results = tmp_path / "TinyModel" / "goods" / "v0" / "images"
    assert {path.relative_to(results) for path in results.rglob("*.*")} == {
        path.relative_to(root) for path in root.glob("*/test/*/*")
    }


def test_missing_data_set_of_several_categories_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/goods/cigarette_box.*github.com/jianzhang96/GoodsAD"):
        MultiCategory("GoodsAD", tmp_path / "goods").prepare_data()
