"""AeBAD reads the published layout with the domains as groups, and no result picture overwrites another."""

import csv
import inspect
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import Kolektor, get_datamodule
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny_model import RawScores, TinyModel
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_pack.data import AeBAD, AeBADDataset, GroupedImageBatch, GroupedImageItem
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics, pixel
from anomalib_pack.post_processing import RankPreservingPostProcessor

DOMAINS = ["background", "illumination", "same", "view"]


def write_split(root, split, label, domain, count, rng):
    """Noisy images, with a spot and its mask if there is a defect."""
    for index in range(count):
        image, mask = rng.normal(100, 20, (32, 32, 3)), np.zeros((32, 32), np.uint8)
        folders = [root / split / label / domain]
        if label != "good":
            mask[6:14, 4:14] = 255
            image[mask > 0] += rng.uniform(10, 40)
            folders.append(root / "ground_truth" / label / domain)
        for folder, pixels in zip(folders, (np.clip(image, 0, 255).astype(np.uint8), mask), strict=False):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"IMG_{index}.png")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """All file names are in all folders; the root is not called as the data set."""
    root = tmp_path_factory.mktemp("blades")
    rng = np.random.default_rng(0)
    for domain in ("background", "illumination", "view"):
        write_split(root / "AeBAD_S", "train", "good", domain, 4, rng)
    for domain in DOMAINS:
        write_split(root / "AeBAD_S", "test", "good", domain, 3, rng)
        for label, count in (("ablation", 2), ("groove", 1)):
            write_split(root / "AeBAD_S", "test", label, domain, count, rng)
    (root / "AeBAD_V" / "train").mkdir(parents=True)
    return root


def make_datamodule(root, **arguments):
    return AeBAD(root, train_batch_size=4, eval_batch_size=4, num_workers=0, **arguments)


def test_arguments_are_those_of_anomalib():
    """The defaults that differ are the data set's, and keep test labels out of validation; two arguments are more."""
    ours, theirs = ({k: v.default for k, v in inspect.signature(c).parameters.items()} for c in (AeBAD, Kolektor))
    assert list(ours) == [*theirs, "vanished_as_normal", "white_level"]
    assert (ours.pop("vanished_as_normal"), ours.pop("white_level")) == (False, None)
    different = {name: value for name, value in ours.items() if value != theirs[name]}
    assert different == {"root": "./datasets/AeBAD", "val_split_mode": "from_train", "val_split_ratio": 0.1}


def test_every_test_image_has_its_domain_and_mask(published):
    dataset = AeBADDataset(published, split="test")
    assert dataset.task == "segmentation"
    assert dataset.samples.groupby(["group", "label"]).size().to_dict() == {
        (domain, label): count for domain in DOMAINS for label, count in (("good", 3), ("ablation", 2), ("groove", 1))
    }
    for item in dataset:
        assert isinstance(item, GroupedImageItem)
        label, domain = item.image_path.split("/")[-3:-1]
        assert item.group == domain
        assert item.gt_label == (label != "good")
        assert item.gt_mask.sum() == (80 if label != "good" else 0)
        assert item.mask_path == ("" if label == "good" else item.image_path.replace("/test/", "/ground_truth/"))


def test_masks_are_those_of_the_domain(published):
    """Masks of one name in other folders are other masks."""
    path = published / "AeBAD_S" / "ground_truth" / "ablation" / "view" / "IMG_1.png"
    kept = path.read_bytes()
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(path)
    full = [item.image_path for item in AeBADDataset(published, split="test") if item.gt_mask.all()]
    path.write_bytes(kept)
    assert full == [str(published / "AeBAD_S" / "test" / "ablation" / "view" / "IMG_1.png")]


def test_training_images_have_their_domain(published):
    samples = AeBADDataset(published, split="train").samples
    assert samples.group.value_counts().to_dict() == {"background": 4, "illumination": 4, "view": 4}
    assert set(samples.label_index) == {0}


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("from_train", (9, 3, 24)),
        ("from_test", (12, 6, 18)),
        ("same_as_test", (12, 24, 24)),
        ("synthetic", (9, 3, 24)),
        ("none", (12, 0, 24)),
    ],
)
def test_validation_split_modes(published, mode, sizes):
    datamodule = make_datamodule(published, val_split_mode=mode, val_split_ratio=0.25, seed=1)
    datamodule.setup()
    loaders = datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()
    train, val, test = ({path for batch in loader for path in batch.image_path} for loader in loaders)
    assert (len(train), len(val), len(test)) == sizes
    assert not train & (val | test)
    assert mode == "same_as_test" or not val & test
    assert all(isinstance(batch, GroupedImageBatch) for batch in datamodule.test_dataloader())


def test_validation_is_normal_by_default(published):
    datamodule = make_datamodule(published)
    datamodule.setup()
    assert datamodule.val_data.has_normal
    assert not datamodule.val_data.has_anomalous
    assert len(datamodule.test_data) == 24


def test_validation_folder_is_refused():
    with pytest.raises(ValueError, match=r"val_split_mode must be one of none, .* got from_dir: .* no validation"):
        AeBAD(val_split_mode="from_dir")


@pytest.mark.parametrize("act", [AeBAD.prepare_data, AeBAD.setup])
def test_missing_data_set_says_where_to_get_it(tmp_path, act):
    with pytest.raises(
        FileNotFoundError,
        match=r"no folder .*/new/AeBAD_S.* not downloaded: .*github.com/zhangzilongc/MMR,.* AeBAD_S\.$",
    ):
        act(AeBAD(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_folders_without_domains_are_refused(tmp_path):
    write_split(tmp_path / "AeBAD_S", "train", "good", ".", 2, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match=r"no images in .*/AeBAD_S/train/\*/\*/: "):
        make_datamodule(tmp_path).setup()


def test_configuration(published):
    datamodule = get_datamodule({"data": {"class_path": "AeBAD", "init_args": {"root": str(published), "seed": 1}}})
    datamodule.prepare_data()
    datamodule.setup()
    assert len(datamodule.test_data) == 24


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    """A real run: metrics, raw scores and results folder."""
    results = tmp_path_factory.mktemp("results")
    raw = RawScores()
    evaluator = GroupEvaluator(test_metrics=[*default_test_metrics(), pixel.AUPROPerImage(prefix="pixel_")])
    model = TinyModel(post_processor=RankPreservingPostProcessor(), evaluator=evaluator, visualizer=True)
    engine = Engine(
        callbacks=[raw], default_root_dir=results, accelerator="cpu", max_epochs=1, enable_progress_bar=False
    )
    metrics = engine.train(model, datamodule=make_datamodule(published, seed=0))[0]
    return metrics, raw, results / "TinyModel" / "AeBAD_S" / "v0"


def test_metrics_are_per_domain(run):
    """Each with its own normal images, and the mean of the four."""
    metrics, raw, results = run
    paths, scores, maps, labels, masks = raw.arrays()
    domains = np.array([path.split("/")[-2] for path in paths])
    expected = [roc_auc_score(labels[domains == domain], scores[domains == domain]) for domain in DOMAINS]
    assert [metrics[f"image_AUROC_{domain}"] for domain in DOMAINS] == pytest.approx(expected, abs=1e-4)
    assert metrics["image_AUROC_mean"] == pytest.approx(np.mean(expected), abs=1e-4)
    per_image = {domain: [] for domain in DOMAINS}
    for domain, image, mask in zip(domains, maps, masks, strict=True):
        if mask.any():
            metric = pixel.AUPRO()
            metric.update(SimpleNamespace(anomaly_map=torch.tensor(image)[None], gt_mask=torch.tensor(mask)[None]))
            per_image[domain].append(metric.compute().item())
    means = [np.mean(per_image[domain]) for domain in DOMAINS]
    assert [metrics[f"pixel_AUPRO_per_image_{domain}"] for domain in DOMAINS] == pytest.approx(means, abs=1e-4)
    assert metrics["pixel_AUPRO_per_image_mean"] == pytest.approx(np.mean(means), abs=1e-4)
    with (results / "metrics.csv").open() as file:
        assert [row["group"] for row in csv.DictReader(file)] == ["overall", *DOMAINS, "mean"]


def test_each_test_image_has_its_own_picture(run, published):
    images = run[2] / "images"
    pictures = {path.relative_to(images) for path in images.rglob("*.png")}
    assert pictures == {path.relative_to(published / "AeBAD_S") for path in published.glob("AeBAD_S/test/*/*/*.png")}
    assert len(pictures) == 24


@pytest.mark.parametrize("as_normal", [False, True])
def test_masks_that_vanish_in_the_crop(published, tmp_path, as_normal):
    """The crop takes 4 pixels off each side of 32; one of the twelve spots is moved there."""
    path = published / "AeBAD_S" / "ground_truth" / "ablation" / "view" / "IMG_1.png"
    kept = path.read_bytes()
    corner = np.zeros((32, 32), np.uint8)
    corner[:4, :4] = 255
    Image.fromarray(corner).save(path)
    raw = RawScores()
    model = TinyModel(
        pre_processor=PreProcessor(Compose([Resize((32, 32)), CenterCrop(24)])),
        post_processor=RankPreservingPostProcessor(),
        evaluator=GroupEvaluator(test_metrics=pixel.AUPROPerImage(prefix="pixel_")),
    )
    engine = Engine(callbacks=[raw], default_root_dir=tmp_path, accelerator="cpu", logger=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.test(model, datamodule=make_datamodule(published, vanished_as_normal=as_normal))
    path.write_bytes(kept)
    count_as = "normal" if as_normal else "anomalous"
    assert [str(each.message) for each in caught if "resize and crop" in str(each.message)] == [
        f"Anomalous images of whose mask the model's resize and crop leave nothing, 1 in all, count as {count_as} "
        f"(vanished_as_normal={as_normal}): test/ablation/view/IMG_1.png."
    ]
    paths, _, _, labels, masks = raw.arrays()
    image = next(index for index, each in enumerate(paths) if each.endswith("test/ablation/view/IMG_1.png"))
    assert not masks[image].any()
    assert labels[image] == (not as_normal)
    assert labels.sum() == (11 if as_normal else 12)
    assert masks.any(axis=(1, 2)).sum() == 11
