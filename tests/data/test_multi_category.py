"""One model over several categories: the joined data, the names of result pictures, and metrics per category."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import multi_category_ddp_run
import numpy as np
import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, MVTecAD, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator
from anomalib.models import Padim, Patchcore
from anomalib.utils.path import generate_output_filename
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import Pad, RandomHorizontalFlip, Resize
from waiting import TIMEOUT

from anomalib_pack.data import GroupedImageBatch, GroupedImageItem, MultiCategory, MVTecLoco
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics

# Of data that does not tell defects apart.
NAMES = [*(metric.name for metric in default_test_metrics() if "defects" not in metric.fields), "mAD"]


def write_images(folder, count, defect=False, size=32, masks=None):
    """Noisy gray images, with a spot of varied strength and its mask if there is a defect."""
    rng = np.random.default_rng([size, count, defect])
    for index in range(count):
        mask = np.zeros((size, size), np.uint8)
        if defect:
            mask[4:14, 6:14] = 255
            if masks:
                save(Path(masks) / f"{index:03}_mask.png", mask)
        image = rng.normal(100, 20, (size, size, 3)) + mask[..., None] * rng.uniform(0, 0.5)
        save(Path(folder) / f"{index:03}.png", np.clip(image, 0, 255).astype(np.uint8))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_category(folder, size=32, normal="good", train=5, defects=5):
    write_images(folder / "train" / normal, train, size=size)
    write_images(folder / "test" / normal, 4, size=size)
    write_images(folder / "test" / "spot", defects, defect=True, size=size, masks=folder / "ground_truth" / "spot")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data set in the layout of MVTec AD whose two categories have equal file names and images of different sizes."""
    root = tmp_path_factory.mktemp("data") / "products"
    write_category(root / "bars", size=48, train=7, defects=4)
    write_category(root / "disc")
    (root / "split_csv").mkdir()
    (root / "readme.txt").touch()
    return root


def products(root, **arguments):
    return MultiCategory(
        "MVTecAD", root, **({"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0} | arguments)
    )


def folders(root, **arguments):
    return [
        Folder(
            name=name,
            root=root / name,
            normal_dir="train/good",
            abnormal_dir="test/spot",
            normal_test_dir="test/good",
            mask_dir="ground_truth/spot",
            **arguments,
        )
        for name in ("bars", "disc")
    ]


def paths_by_group(dataset):
    return {group: set(rows.image_path) for group, rows in dataset.samples.groupby("group")}


# --- The data ---


@pytest.mark.parametrize(
    "splits",
    [
        {},
        {"val_split_mode": "from_train", "val_split_ratio": 0.4, "seed": 5},
        {"val_split_mode": "from_test", "val_split_ratio": 0.4, "seed": 5},
        {"test_split_mode": "none", "val_split_mode": "same_as_test"},
    ],
)
def test_each_category_is_split_as_alone(root, splits):
    datamodule = products(root, **splits)
    datamodule.setup()
    alone = {category: MVTecAD(root, category, num_workers=0, **splits) for category in ("bars", "disc")}
    for category in alone.values():
        category.setup()
    for data in ("train_data", "val_data", "test_data"):
        joined = getattr(datamodule, data)
        expected = {name: set(getattr(category, data).samples.image_path) for name, category in alone.items()}
        assert paths_by_group(joined) == expected
        assert joined.samples.index.is_unique
        assert len(joined) == sum(map(len, expected.values()))


def test_no_validation(root):
    """Lightning skips validation for an empty list of loaders; Anomalib's datamodules fail instead."""
    datamodule = products(root, val_split_mode="none")
    datamodule.setup()
    assert datamodule.val_dataloader() == []
    assert len(datamodule.train_dataloader().dataset) > 0


def test_training_takes_every_image_once_in_mixed_order(root):
    datamodule = products(root)
    datamodule.setup()
    torch.manual_seed(0)
    epochs = [list(datamodule.train_dataloader()) for _ in range(2)]
    orders = [[path for batch in epoch for path in batch.image_path] for epoch in epochs]
    assert all(sorted(order) == sorted(datamodule.train_data.samples.image_path) for order in orders)
    assert orders[0] != orders[1]
    assert any(set(batch.group) == {"bars", "disc"} for batch in epochs[0])
    assert all(isinstance(batch, GroupedImageBatch) for epoch in epochs for batch in epoch)


def test_items_are_those_of_the_category(root):
    datamodule = products(root)
    datamodule.setup()
    for category in ("bars", "disc"):
        alone = MVTecAD(root, category)
        alone.setup()
        expected = {item.image_path: item for item in alone.test_data}
        items = [item for item in datamodule.test_data if item.group == category]
        assert len(items) == len(expected) == {"bars": 8, "disc": 9}[category]
        for item in items:
            assert isinstance(item, GroupedImageItem)
            assert torch.equal(item.image, expected[item.image_path].image)
            assert torch.equal(item.gt_mask, expected[item.image_path].gt_mask)
            assert item.gt_label == expected[item.image_path].gt_label
            assert item.mask_path == (expected[item.image_path].mask_path or "")


def test_augmentations_reach_every_category(root):
    plain, flipped = products(root), products(root, test_augmentations=RandomHorizontalFlip(1.0))
    for datamodule in (plain, flipped):
        datamodule.setup()
    for before, after in zip(plain.test_data, flipped.test_data, strict=True):
        assert torch.equal(before.image.flip(-1), after.image)
        assert torch.equal(before.gt_mask.flip(-1), after.gt_mask)
    assert torch.equal(plain.train_data[0].image, flipped.train_data[0].image)


def test_samples_can_be_subsampled(root):
    datamodule = products(root)
    datamodule.setup()
    half = datamodule.test_data.subsample([16, 0, 10])
    assert [item.image_path for item in half] == half.samples.image_path.tolist()
    assert set(half.samples.image_path) == set(datamodule.test_data.samples.image_path.iloc[[16, 0, 10]])


def test_unreadable_image_is_named(tmp_path):
    write_category(tmp_path / "disc")
    broken = tmp_path / "disc" / "train" / "good" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    datamodule = products(tmp_path)
    datamodule.setup()
    with pytest.raises(OSError, match=f"Cannot read {broken}: .* Replace"):
        list(datamodule.train_data)


@pytest.mark.parametrize(("kept", "message"), [("test", "no training images in"), ("nothing", "Found 0 images in")])
def test_category_without_images_is_named(tmp_path, kept, message):
    write_category(tmp_path / "disc")
    for path in (tmp_path / "disc").rglob("*.png"):
        if path.parts[-3] == "train" or kept == "nothing":
            path.rename(path.with_suffix(".txt"))
    with pytest.raises((ValueError, RuntimeError), match=f"{message} {tmp_path / 'disc'}"):
        products(tmp_path).setup()


# --- Which categories ---


def test_finds_category_folders_only(root):
    datamodule = products(root)
    datamodule.prepare_data()
    datamodule.setup()
    assert set(datamodule.train_data.samples.group) == {"bars", "disc"}
    assert datamodule.test_data.defects is None  # MVTec AD has none
    datamodule = products(root, categories=["disc"])
    datamodule.setup()
    assert set(datamodule.train_data.samples.group) == {"disc"}


def test_wrong_category_lists_the_right_ones(root):
    for act in (MultiCategory.prepare_data, MultiCategory.setup):
        with pytest.raises(ValueError, match=f"among those in {root}: bars, disc; got dics"):
            act(products(root, categories=["bars", "dics"]))


def write_visa(root):
    for category in ("candle", "fryum"):
        write_category(root / "visa_pytorch" / category)
        (root / category / "Data").mkdir(parents=True)
    (root / "split_csv").mkdir()


def write_real_iad(root):
    for category in ("audiojack", "toy"):
        rows = {"train": [("OK", 10)], "test": [("OK", 4), ("AK", 5)]}
        metadata = {}
        for split, kinds in rows.items():
            metadata[split] = []
            for kind, count in kinds:
                folder = root / "realiad_512" / category / split / kind
                write_images(folder, count, defect=kind != "OK", masks=folder / "masks")
                for index in range(count):
                    mask = f"{split}/{kind}/masks/{index:03}_mask.png" if kind != "OK" else None
                    path = f"{split}/{kind}/{index:03}.png"
                    metadata[split].append({"image_path": path, "mask_path": mask, "anomaly_class": kind})
        path = root / "realiad_jsons" / "realiad_jsons" / f"{category}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metadata))
    (root / "realiad_512" / "unpacked").mkdir()


def write_mvtec_ad_2(root):
    for category in ("can", "fabric"):
        for split in ("train", "validation", "test_public"):
            write_images(root / category / split / "good", 4)
        test = root / category / "test_public"
        write_images(test / "bad", 5, defect=True, masks=test / "ground_truth" / "bad")
        for split in ("test_private", "test_private_mixed"):
            write_images(root / category / split, 2)


def write_btech(root):
    for category in ("01", "02"):
        write_category(root / category, normal="ok")
        for mask in (root / category / "ground_truth" / "spot").iterdir():
            mask.rename(mask.with_name(mask.name.replace("_mask", "")))


def write_loco(root):
    for category in ("pushpins", "own_part"):
        for split in ("train", "validation", "test"):
            write_images(root / category / split / "good", 4)
        write_images(root / category / "test" / "logical_anomalies", 5, defect=True)
        for index in range(5):
            mask = root / category / "ground_truth" / "logical_anomalies" / f"{index:03}" / "000.png"
            save(mask, np.full((32, 32), 255, np.uint8))


@pytest.mark.parametrize(
    ("dataset", "write", "categories", "arguments"),
    [
        ("Visa", write_visa, {"candle", "fryum"}, {}),
        ("RealIAD", write_real_iad, {"audiojack", "toy"}, {"dataset_args": {"resolution": 512}}),
        ("MVTecAD2", write_mvtec_ad_2, {"can", "fabric"}, {}),
        ("BTech", write_btech, {"01", "02"}, {}),
        ("MVTecLoco", write_loco, {"pushpins", "own_part"}, {}),
    ],
)
def test_layouts(tmp_path, dataset, write, categories, arguments):
    root = tmp_path / "root"
    write(root)
    if dataset == "RealIAD":  # Anomalib's default leaves normal images out of its test set
        arguments = arguments | {"test_split_mode": "from_dir"}
    datamodule = MultiCategory(dataset, root, num_workers=0, **arguments)
    datamodule.prepare_data()
    datamodule.setup()
    assert set(datamodule.train_data.samples.group) == categories
    assert set(datamodule.val_data.samples.group) == categories
    batch = datamodule.test_data.collate_fn(list(datamodule.test_data))
    counts = {(group, label): 0 for group in categories for label in (False, True)}
    for group, label, mask in zip(batch.group, batch.gt_label, batch.gt_mask, strict=True):
        counts[group, bool(label)] += 1
        assert mask.any() == label
    assert counts == {(group, label): 5 if label else 4 for group in categories for label in (False, True)}
    assert_pictures_differ(datamodule)


def test_ratio_for_which_the_datamodule_has_no_argument(tmp_path):
    write_real_iad(tmp_path)
    splits = {"test_split_mode": "from_dir", "val_split_mode": "from_train", "val_split_ratio": 0.1}
    datamodule = MultiCategory("RealIAD", tmp_path, dataset_args={"resolution": 512}, seed=0, **splits)
    datamodule.setup()
    assert datamodule.train_data.samples.group.value_counts().to_dict() == {"audiojack": 9, "toy": 9}
    assert datamodule.val_data.samples.group.value_counts().to_dict() == {"audiojack": 1, "toy": 1}


def test_renders_what_is_missing(tmp_path):
    sizes = {"image_size": 64, "num_train": 2, "num_val": 1, "num_test": 1}
    datamodule = MultiCategory("SyntheticLoco", tmp_path, dataset_args=sizes, num_workers=0)
    datamodule.prepare_data()
    datamodule.setup()
    assert datamodule.train_data.samples.group.value_counts().to_dict() == {"board": 2, "tray": 2}
    assert {item.group for item in datamodule.test_data} == {"board", "tray"}
    board = MVTecLoco(tmp_path, "board")
    board.setup()
    assert len(datamodule.test_data) == 2 * len(board.test_data)


def test_data_that_is_missing_is_for_the_wrapped_datamodule_to_get(tmp_path):
    with pytest.raises(RuntimeError, match="MPDD dataset not found in"):
        MultiCategory("MPDD", tmp_path / "new").prepare_data()


def test_wrong_root_gets_no_download(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        ValueError, match=f"{tmp_path} holds files, but there are no categories in {tmp_path} as MVTecAD"
    ):
        products(tmp_path).prepare_data()
    assert list(tmp_path.iterdir()) == [tmp_path / "photos"]
    with pytest.raises(ValueError, match=f"no categories of MVTecAD in {tmp_path}"):
        products(tmp_path).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "MVTec"}, "dataset must be one of .*MPDD, MVTecAD, .*Visa, or a list of Folder, got 'MVTec'"),
        ({"dataset": "Kaputt"}, "dataset must be one of"),
        ({"dataset": "UCSDped"}, "dataset must be one of"),  # videos
        ({"dataset": "MVTecAD", "categories": "bottle"}, "categories must be 'all' or a list of names, got 'bottle'"),
        ({"dataset": "BTech", "categories": [1, 2]}, r"categories must be .* got \[1, 2\]. Numbers have to be quoted"),
        ({"dataset": "MVTecAD", "categories": []}, r"categories must be .* got \[\]"),
        ({"dataset": "MVTecAD", "categories": ["a", "a"]}, "categories must have different names, got a, a"),
        ({"dataset": "MVTecAD2", "val_split_mode": "from_test"}, "val_split_mode is no argument of MVTecAD2"),
        ({"dataset": "MVTecAD2", "val_split_ratio": 0.1}, "val_split_ratio is no argument of MVTecAD2"),
        ({"dataset": "MVTecAD", "dataset_args": {"resolution": 1}}, "resolution is no argument of MVTecAD"),
        ({"dataset": "MVTecAD", "dataset_args": {"category": "a"}}, "dataset_args must not have category"),
        ({"dataset": "MVTecAD", "dataset_args": {"seed": 1}}, "dataset_args must not have seed"),
        ({"dataset": []}, r"dataset must be .* got \[\]"),
        ({"dataset": [MVTecAD()]}, "dataset must be the name of a datamodule or a list of Folder, got <anomalib"),
        ({"dataset": [{"name": "a", "normal_dir": "b"}]}, "dataset must be .* got {'name': 'a'"),
        (
            {"dataset": [{"class_path": "Folder", "init_args": {"augmentations": {"class_path": "Resize"}}}]},
            "augmentations of a Folder must be transforms, not their configuration, got {'class_path': 'Resize'}",
        ),
        ({"dataset": [Folder("a", "b")], "root": "c"}, "root must not be given with a list of Folder"),
        ({"dataset": [Folder("a", "b"), Folder("a", "c")]}, "dataset must have different names, got a, a"),
        ({"dataset": [Folder("a", "/b/c"), Folder("d", "/e")]}, "dataset must have a folder .* /b/c, /e have none"),
    ],
)
def test_impossible_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCategory(**arguments)


# --- Folders ---


def test_folders(root):
    datamodule = MultiCategory(folders(root), num_workers=0, val_split_mode="from_train", val_split_ratio=0.4, seed=1)
    datamodule.prepare_data()
    datamodule.setup()
    assert datamodule.train_data.samples.group.value_counts().to_dict() == {"bars": 5, "disc": 3}
    assert datamodule.val_data.samples.group.value_counts().to_dict() == {"bars": 2, "disc": 2}
    assert datamodule.test_data.samples.group.value_counts().to_dict() == {"bars": 8, "disc": 9}
    assert datamodule.name == "products"
    assert_pictures_differ(datamodule)


def test_augmentations_of_a_folder_come_before_those_for_all(root):
    own, plain = folders(root, augmentations=Resize([16, 16]))[0], folders(root)[1]
    datamodule = MultiCategory([own, plain], num_workers=0, test_augmentations=Pad(1))
    datamodule.setup()
    for data, sides in (("train_data", {"bars": 16, "disc": 32}), ("test_data", {"bars": 18, "disc": 34})):
        for item in getattr(datamodule, data):
            assert item.image.shape[-2:] == item.gt_mask.shape == (sides[item.group],) * 2


def test_masks_that_some_categories_lack_are_left_out(root):
    datamodules = folders(root)
    datamodules[0].mask_dir = None
    datamodule = MultiCategory(datamodules, num_workers=0)
    with pytest.warns(
        UserWarning, match="categories bars have no masks. The masks of the other categories are left out"
    ):
        datamodule.setup()
    for batch in (datamodule.test_data.collate_fn(list(data)) for data in (datamodule.test_data, datamodule.val_data)):
        assert batch.gt_mask is None
        assert set(batch.group) == {"bars", "disc"}


def test_category_without_anomalies_takes_no_masks_away(root, tmp_path):
    shutil.copytree(root / "bars", tmp_path / "bars")
    shutil.copytree(root / "disc", tmp_path / "disc")
    shutil.rmtree(tmp_path / "bars" / "test" / "spot")
    shutil.rmtree(tmp_path / "bars" / "ground_truth")
    datamodule = MultiCategory("MVTecAD", tmp_path, num_workers=0)
    datamodule.setup()
    batch = datamodule.test_data.collate_fn([item for item in datamodule.test_data if item.image.shape[-1] == 32])
    assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.tolist()
    normal = [item for item in datamodule.test_data if item.group == "bars"]
    assert normal
    for item in normal:
        assert item.gt_mask.shape == item.image.shape[-2:]
        assert not item.gt_mask.any()


# --- Result pictures ---


def assert_pictures_differ(datamodule):
    items = list(datamodule.test_data)
    pictures = [
        generate_output_filename(item.image_path, "out", datamodule.name, datamodule.category, mkdir=False)
        for item in items
    ]
    assert len(set(pictures)) == len(pictures) > 0
    assert all(item.group in picture.parts for item, picture in zip(items, pictures, strict=True))
    assert all(Path(path).is_file() for path in datamodule.test_data.samples.image_path)


@pytest.mark.parametrize("mode", ["from_dir", "synthetic"])
@pytest.mark.parametrize("linked", ["nothing", "root", "category"])
def test_pictures_of_linked_data_differ(root, tmp_path, mode, linked):
    if linked == "root":
        (tmp_path / "link").symlink_to(root)
        root = tmp_path / "link"
    elif linked == "category":
        other = tmp_path / "links"
        other.mkdir()
        (other / "bars").symlink_to(root / "bars")
        (other / "disc").symlink_to(root / "disc")
        root = other
    datamodule = products(root, test_split_mode=mode)
    datamodule.setup()
    assert_pictures_differ(datamodule)


def test_pictures_of_linked_folders_differ(root, tmp_path):
    (tmp_path / "bars").symlink_to(root / "bars")
    write_category(tmp_path / "disc")
    datamodules = folders(tmp_path)
    datamodules[1].normal_dir = ["train/good"]
    datamodule = MultiCategory(datamodules, num_workers=0)
    datamodule.setup()
    assert datamodule.name == tmp_path.name
    assert_pictures_differ(datamodule)


@pytest.mark.parametrize("name", ["bars", "MultiCategory", "test"])
def test_pictures_differ_whatever_the_folders_are_called(root, tmp_path, name):
    """The root has the name of a category, of the class, or of a folder within the categories."""
    data = tmp_path / name / "data" / name
    for category in ("bars", name, "disc"):
        if not (data / category).exists():
            write_category(data / category)
    datamodule = products(data)
    datamodule.setup()
    assert_pictures_differ(datamodule)


def test_root_is_the_working_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    datamodule = products(".")
    datamodule.setup()
    assert datamodule.name == "products"
    assert_pictures_differ(datamodule)


# --- Runs ---


def small_patchcore(**arguments):
    return Patchcore(
        backbone="resnet18",
        layers=["layer2"],
        pre_trained=False,
        coreset_sampling_ratio=0.2,
        pre_processor=Patchcore.configure_pre_processor((64, 64)),
        **arguments,
    )


def quiet_engine(results):
    return Engine(
        default_root_dir=results,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def with_groups(names, groups=("bars", "disc")):
    return {f"{name}{end}" for name in names for end in ("", *(f"_{group}" for group in groups), "_mean")}


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A stock model that was trained and tested through Anomalib's engine: engine, metrics and results folder."""
    torch.manual_seed(0)
    engine, model = quiet_engine(tmp_path_factory.mktemp("results")), small_patchcore()
    metrics = engine.train(model, datamodule=products(root))[0]
    return engine, metrics, Path(engine.trainer.default_root_dir)


def test_metrics_of_a_stock_model_are_per_category(run, root):
    engine, metrics, _ = run
    assert set(metrics) == with_groups(NAMES)
    batches = engine.predict(engine.model, datamodule=products(root))
    groups = np.array([group for batch in batches for group in batch.group])
    scores = np.concatenate([batch.pred_score.flatten().numpy() for batch in batches])
    labels = np.concatenate([batch.gt_label.numpy() for batch in batches])
    for group in ("bars", "disc"):
        chosen = groups == group
        expected = roc_auc_score(labels[chosen], scores[chosen])
        assert metrics[f"image_AUROC_{group}"] == pytest.approx(expected, abs=1e-4)
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    for name in NAMES:
        assert metrics[f"{name}_mean"] == pytest.approx((metrics[f"{name}_bars"] + metrics[f"{name}_disc"]) / 2)


def test_pictures_and_table_of_a_run(run, root):
    _, _, results = run
    assert results.parts[-3:] == ("Patchcore", "products", "v0")
    pictures = {path.relative_to(results / "images") for path in results.rglob("images/**/*.png")}
    assert pictures == {path.relative_to(root) for path in root.glob("*/test/*/*.png")}
    with (results / "metrics.csv").open() as file:
        assert [row["group"] for row in csv.DictReader(file)] == ["overall", "bars", "disc", "mean"]


def test_checkpoint_tests_the_same(run, root, tmp_path):
    _, metrics, results = run
    checkpoint = results / "weights" / "lightning" / "model.ckpt"
    fresh = small_patchcore(visualizer=False)
    assert quiet_engine(tmp_path).test(fresh, datamodule=products(root), ckpt_path=checkpoint)[0] == metrics
    loaded = Patchcore.load_from_checkpoint(checkpoint)
    assert type(loaded.evaluator) is Evaluator
    tested = quiet_engine(tmp_path).test(loaded, datamodule=products(root, categories=["disc"]))[0]
    # The same images, under another threshold if any: what needs none has the same value.
    assert tested["image_AUROC_disc"] == metrics["image_AUROC_disc"]
    assert tested["pixel_AUPRO_disc"] == metrics["pixel_AUPRO_disc"]


def padim(evaluator):
    return Padim(
        backbone="resnet18",
        layers=["layer1"],
        pre_trained=False,
        n_features=5,
        pre_processor=Padim.configure_pre_processor((32, 32)),
        evaluator=evaluator,
        visualizer=False,
    )


class OwnEvaluator(Evaluator):
    """An evaluator of the user's."""


@pytest.mark.parametrize(
    ("evaluator", "names"),
    [
        (False, set()),
        (OwnEvaluator(test_metrics=[AUPR(fields=["pred_score", "gt_label"])]), {"AUPR"}),
        (GroupEvaluator(test_metrics=[AUPR(fields=["pred_score", "gt_label"])]), with_groups(["AUPR"])),
        (Evaluator(test_metrics=[AUPR(fields=["pred_score", "gt_label"])]), with_groups(["AUPR", *NAMES])),
    ],
    ids=["none", "own", "groups", "stock"],
)
def test_only_stock_evaluators_are_replaced(root, tmp_path, evaluator, names):
    model = padim(evaluator)
    before = model.evaluator
    engine = quiet_engine(tmp_path)
    metrics = engine.train(model, datamodule=products(root))[0]
    assert set(metrics) == names
    assert (model.evaluator is before) == (type(evaluator) is not Evaluator)


def test_validation_metrics_and_checkpoints_of_a_stock_evaluator_are_kept(root, tmp_path):
    """AUPRO has a buffer, which is in the checkpoints of models with the stock evaluator."""

    def evaluator():
        return Evaluator(
            val_metrics=[AUROC(fields=["pred_score", "gt_label"], prefix="val_")],
            test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")],
        )

    alone = quiet_engine(tmp_path)
    alone.fit(padim(evaluator()), datamodule=MVTecAD(root, "disc", num_workers=0))
    engine = quiet_engine(tmp_path)
    datamodule = products(root)
    metrics = engine.test(padim(evaluator()), datamodule=datamodule, ckpt_path=alone.best_model_path)[0]
    assert set(metrics) == with_groups(NAMES)
    assert engine.validate(engine.model, datamodule=datamodule)[0].keys() == {"val_AUROC"}


# --- Commands ---


def test_train_command_with_folders_in_a_configuration(root, tmp_path):
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [32, 32]}}
    arguments = {
        "backbone": "resnet18",
        "layers": ["layer1"],
        "pre_trained": False,
        "n_features": 5,
        "pre_processor": {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": resize}},
    }
    config = {
        "model": {"class_path": "Padim", "init_args": arguments},
        "data": {"class_path": "MultiCategory", "init_args": {"dataset": folder_configs(root), "num_workers": 0}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "default_root_dir": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = AnomalibCLI(["train", "--config", str(tmp_path / "config.yaml")])
    assert with_groups(NAMES) == set(cli.engine.trainer.callback_metrics)
    results = tmp_path / "Padim" / "products" / "latest"
    assert len(list(results.rglob("images/**/*.png"))) == len(cli.datamodule.test_data) > 0


def folder_configs(root):
    names = {"normal_dir": "train/good", "abnormal_dir": "test/spot", "mask_dir": "ground_truth/spot"}
    return [
        {
            "class_path": "Folder",
            "init_args": {"name": name, "root": str(root / name), "normal_test_dir": "test/good"} | names,
        }
        for name in ("bars", "disc")
    ]


def test_benchmark_reports_categories(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 5}
    data = {"dataset": "MVTecAD", "root": str(root), "categories": ["disc", "bars"], "num_workers": 0}
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 1,
            "model": {"class_path": "Padim", "init_args": model},
            "data": {"class_path": "MultiCategory", "init_args": data},
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    AnomalibCLI(["benchmark", "--config", "config.yaml"])
    (path,) = tmp_path.rglob("results.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert with_groups(NAMES) <= set(row)
    assert all(0 <= float(row[name]) <= 1 for name in with_groups(NAMES))


def test_folders_in_the_configuration_of_a_benchmark(root):
    """The benchmark hands over what is in the file as it is."""
    arguments = {"dataset": folder_configs(root), "num_workers": 0, "seed": 1}
    datamodule = get_datamodule({"class_path": "MultiCategory", "init_args": arguments})
    datamodule.setup()
    assert datamodule.name == "products"
    assert set(datamodule.train_data.samples.group) == {"bars", "disc"}


def test_two_processes_give_what_one_gives(root, tmp_path):
    command = [sys.executable, multi_category_ddp_run.__file__, root, tmp_path, "2"]
    paths = os.pathsep.join([*map(str, Path(__file__).parents[1:3]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True, timeout=TIMEOUT)
    two = json.loads((tmp_path / "results.json").read_text())
    one, _ = multi_category_ddp_run.run(root, tmp_path / "one", 1)
    assert set(one) == with_groups(NAMES)
    assert two == pytest.approx(one, abs=1e-6)
