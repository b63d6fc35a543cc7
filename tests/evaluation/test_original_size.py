"""Metrics at the size of the image files, against values computed from the files and the raw maps of a run."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import F1Score
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from tiny_model import RawScores, TinyModel
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Pad, RandomHorizontalFlip, Resize

from anomalib_pack.data import MultiCategory, MVTecLoco
from anomalib_pack.defect import Defect
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics, pixel
from anomalib_pack.metrics.group_evaluator import EVERY_GROUP
from anomalib_pack.metrics.original_size import Bits, check_whole_image, mask_files
from anomalib_pack.metrics.spro import auc_spro, loco_result
from anomalib_pack.post_processing import RankPreservingPostProcessor

GROUPS = ("logical_anomalies", "structural_anomalies")


@pytest.fixture
def tray(loco_root):
    """Rendered images of 64x64, twice as large as the network's input."""
    return MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=3, num_workers=0)


def model_of(evaluator, post_processor=True, transform=None):
    seed_everything(0)
    pre_processor = True if transform is None else PreProcessor(transform=transform)
    post_processor = RankPreservingPostProcessor() if post_processor is True else post_processor
    return TinyModel(pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator)


def run(model, datamodule, results, max_epochs=1):
    raw = RawScores()
    engine = Engine(
        callbacks=[raw],
        accelerator="cpu",
        max_epochs=max_epochs,
        default_root_dir=results,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    engine.fit(model, datamodule=datamodule)
    return engine.test(model, datamodule=datamodule)[0], raw, Path(engine.trainer.default_root_dir)


def large_maps(raw, sizes):
    """Raw maps, resized by another library."""
    maps = torch.cat(raw.maps).reshape(len(raw.paths), *raw.maps[0].shape[-2:]).numpy()
    return [
        cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        for image, size in zip(maps, sizes, strict=True)
    ]


def mask_of(path, files):
    size = Image.open(path).size[::-1]
    masks = [np.array(Image.open(file)) > 0 for file in files]
    return np.any([np.zeros(size, bool), *masks], axis=0)


def loco_masks(paths):
    """Union of the masks of each image."""
    masks = []
    for path in map(Path, paths):
        folder = path.parents[2] / "ground_truth" / path.parent.name / path.stem
        masks.append(mask_of(path, folder.iterdir() if folder.is_dir() else []))
    return masks


def pixel_values(maps, masks, threshold):
    scores = np.concatenate([image.ravel() for image in maps])
    truth = np.concatenate([mask.ravel() for mask in masks])
    return {
        "pixel_AUROC": roc_auc_score(truth, scores),
        "pixel_AP": average_precision_score(truth, scores),
        "pixel_F1Score": f1_score(truth, scores >= threshold),
        "pixel_AUPRO": aupro(maps, masks),
    }


def aupro(maps, masks, limit=0.3):
    """Regions are defects that are to be found as a whole."""
    regions = []
    for mask in masks:
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        parts = [torch.from_numpy(labels == label) for label in range(1, count + 1)]
        regions.append([Defect("", part, int(part.sum())) for part in parts])
    return auc_spro(maps, regions, [limit])[limit]


def members(paths, group):
    return [index for index, path in enumerate(paths) if Path(path).parent.name in {"good", group}]


def test_loco(tray, tmp_path, capsys):
    """Pixel metrics and AUC-sPRO of each group, in the results, the table and the files."""
    model = model_of(GroupEvaluator(map_size="original"))
    metrics, raw, folder = run(model, tray, tmp_path)
    masks = loco_masks(raw.paths)
    maps = large_maps(raw, [mask.shape for mask in masks])
    assert masks[0].shape == (64, 64)
    defects = [tray.test_data.defects(path) for path in raw.paths]
    assert [np.any([each.mask for each in found], axis=0).sum() for found in defects if found] == [
        mask.sum() for mask in masks if mask.any()
    ]
    threshold = model.post_processor.raw_pixel_threshold.item()
    for group in GROUPS:
        chosen = members(raw.paths, group)
        part = [[values[index] for index in chosen] for values in (maps, masks, defects)]
        for name, value in pixel_values(*part[:2], threshold).items():
            assert metrics[f"{name}_{group}"] == pytest.approx(value, abs=1e-4)
        value = auc_spro(part[0], part[2])[0.05]
        assert metrics[f"pixel_SPRO_{group}"] == pytest.approx(value, abs=1e-5)
    assert metrics["pixel_SPRO_mean"] == pytest.approx(np.mean([metrics[f"pixel_SPRO_{group}"] for group in GROUPS]))
    groups = [Path(path).parent.name.replace("good", EVERY_GROUP) for path in raw.paths]
    expected = loco_result(maps, groups, defects)
    found = json.loads((folder / "tray_metrics.json").read_text())
    assert found["classification"]["auc_roc"] == pytest.approx(expected["classification"]["auc_roc"])
    for group in (*GROUPS, "mean"):
        areas = found["localization"]["auc_spro"][group]
        assert areas == pytest.approx(expected["localization"]["auc_spro"][group], abs=1e-5)
        assert areas["0.05"] == pytest.approx(metrics[f"pixel_SPRO_{group}"], abs=1e-6)
    with (folder / "metrics.csv").open() as file:
        rows = {row["group"]: float(row["pixel_SPRO"]) for row in csv.DictReader(file)}
    assert rows["structural_anomalies"] == pytest.approx(metrics["pixel_SPRO_structural_anomalies"], abs=1e-6)
    assert "SPRO" in capsys.readouterr().out


def test_spro_is_at_the_original_size_whatever_the_others_are(tray, tmp_path):
    values = {
        size: run(model_of(GroupEvaluator(map_size=size)), tray, tmp_path / size)[0] for size in ("input", "original")
    }
    same = {name for name, value in values["input"].items() if value == values["original"][name]}
    for metric in ("image_AUROC", "image_F1Score", "pixel_SPRO"):
        assert same > {f"{metric}{end}" for end in ("", *(f"_{group}" for group in GROUPS), "_mean")}
    assert same.isdisjoint(f"{metric}{end}" for metric in ("pixel_AP", "pixel_AUPRO") for end in ("", "_mean"))


def patchcore(evaluator):
    seed_everything(0)
    return Patchcore(
        backbone="resnet18",
        pre_trained=False,
        coreset_sampling_ratio=0.05,
        pre_processor=Patchcore.configure_pre_processor((64, 64)),
        evaluator=evaluator,
        visualizer=False,
    )


def test_patchcore_with_anomalibs_data(images, tmp_path):
    """Anomalib's model, post-processor and data: masks vanish from batches whose first image is normal."""
    datamodule = MVTecAD(images, "cloth", 4, 4, num_workers=0, val_split_mode="from_train", val_split_ratio=0.3, seed=0)
    evaluator = GroupEvaluator(map_size="original", group_by="folder")
    model = patchcore(evaluator)
    metrics, raw, folder = run(model, datamodule, tmp_path)
    files = [Path(str(path).replace("/test/", "/ground_truth/")) for path in raw.paths]
    files = [file.with_name(f"{file.stem}_mask.png") for file in files]
    masks = [mask_of(path, [file] if file.is_file() else []) for path, file in zip(raw.paths, files, strict=True)]
    maps = large_maps(raw, [(32, 32)] * len(masks))
    expected = pixel_values(maps, masks, 0)
    del expected["pixel_F1Score"]  # the threshold of Anomalib's post-processor is on normalised scores
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4)
    post = model.post_processor
    predicted = [
        post._normalize(torch.from_numpy(image), post.pixel_min, post.pixel_max, post.pixel_threshold) for image in maps
    ]
    predicted = np.concatenate([(image > post.normalized_pixel_threshold).flatten() for image in predicted])
    truth = np.concatenate([mask.ravel() for mask in masks])
    assert metrics["pixel_F1Score"] == pytest.approx(f1_score(truth, predicted), abs=1e-4)
    assert "pixel_SPRO" not in metrics
    assert not list(folder.glob("*_metrics.json"))


def folder_of_sizes(root):
    """Folder datamodule with images of different sizes, one of them turned on its side."""
    rng = np.random.default_rng(0)
    sizes = [(40, 50), (70, 44), (33, 90), (64, 64)]
    for name, count in (("good", 10), ("bad", 4)):
        for index in range(count):
            height, width = sizes[index % 4]
            image, mask = rng.normal(100, 12, (height, width, 3)), np.zeros((height, width), np.uint8)
            if name == "bad":
                mask[5 : 5 + height // 3, 9 : 9 + width // 3] = 255
                image[mask > 0] += 30
                write(root / "masks" / f"{index}.png", mask)
            write(root / name / f"{index}.png", image.clip(0, 255).astype(np.uint8))
    return Folder(
        "sizes",
        root=root,
        normal_dir="good",
        abnormal_dir="bad",
        mask_dir="masks",
        train_batch_size=1,
        eval_batch_size=1,
        num_workers=0,
        val_split_mode="from_train",
        val_split_ratio=0.3,
        seed=0,
    )


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_different_sizes(tmp_path):
    datamodule = folder_of_sizes(tmp_path / "data")
    model = model_of(GroupEvaluator(map_size="original"))
    metrics, raw, _ = run(model, datamodule, tmp_path / "results")
    files = {path: Path(path).parents[1] / "masks" / Path(path).name for path in raw.paths if "bad" in path}
    masks = [mask_of(path, [files[path]] if path in files else []) for path in raw.paths]
    assert {mask.shape for mask in masks} == {(40, 50), (70, 44), (33, 90), (64, 64)}
    maps = large_maps(raw, [mask.shape for mask in masks])
    for name, value in pixel_values(maps, masks, model.post_processor.raw_pixel_threshold.item()).items():
        assert metrics[name] == pytest.approx(value, abs=1e-4)


def test_several_categories(loco_root, tmp_path):
    """Joined data: an own configuration of defects, masks and groups for each category."""
    datamodule = MultiCategory(
        "MVTecLoco", loco_root, ["tray"], train_batch_size=4, eval_batch_size=4, num_workers=0, group_by="group"
    )
    evaluator = GroupEvaluator(map_size="original")
    joined, _, folder = run(model_of(evaluator), datamodule, tmp_path / "joined", max_epochs=0)
    tray = MVTecLoco(loco_root, "tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    alone, _, alone_folder = run(model_of(GroupEvaluator(map_size="original")), tray, tmp_path / "alone", max_epochs=0)
    for group in GROUPS:
        for name in ("pixel_SPRO", "pixel_AUPRO", "pixel_AUROC"):
            assert joined[f"{name}_tray/{group}"] == pytest.approx(alone[f"{name}_{group}"], abs=1e-6)
    name = "tray_metrics.json"
    assert json.loads((folder / name).read_text()) == json.loads((alone_folder / name).read_text())


CROPS = {
    "crop": Compose([Resize((40, 40)), CenterCrop((32, 32))]),
    "pad": Compose([Resize((28, 28)), Pad(2)]),
    "flip": Compose([Resize((32, 32)), RandomHorizontalFlip(p=1)]),
}
WHOLE = {
    "smaller": Resize((32, 32)),
    "larger": Resize((96, 128)),
    "shorter side": Resize(48),
    "twice": Compose([Resize((48, 40)), Resize((32, 32)), Normalize([0.5] * 3, [0.2] * 3)]),
    "none": None,
}


@pytest.mark.parametrize("kind", CROPS)
def test_maps_of_a_part_are_refused(kind, tray, tmp_path):
    with pytest.raises(ValueError, match=r"TinyModel do not show images of size \(64, 64\) .* from edge to edge"):
        run(model_of(GroupEvaluator(map_size="original"), transform=CROPS[kind]), tray, tmp_path)


def test_defaults_go_on_without_spro(tray, tmp_path):
    """Metrics that nobody asked for end no run."""
    with pytest.warns(UserWarning, match="pixel_SPRO is left out. The maps of TinyModel do not show images"):
        metrics, _, _ = run(model_of(GroupEvaluator(), transform=CROPS["crop"]), tray, tmp_path)
    assert "pixel_AUPRO" in metrics
    assert "pixel_SPRO" not in metrics
    with pytest.raises(ValueError, match="do not show images"):
        run(model_of(GroupEvaluator(test_metrics=pixel.SPRO()), transform=CROPS["crop"]), tray, tmp_path)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("size", [(64, 64), (45, 101)])
def test_maps_of_whole_images_are_taken(kind, size, tmp_path):
    write(tmp_path / "image.png", np.zeros((*size, 3), np.uint8))
    samples = SimpleNamespace(image_path=[tmp_path / "image.png"])
    dataset = SimpleNamespace(samples=samples, augmentations=Resize((32, 32)))
    model = SimpleNamespace(name="TinyModel", pre_processor=SimpleNamespace(transform=WHOLE[kind]))
    check_whole_image(model, dataset)
    dataset.augmentations = CenterCrop(30)
    with pytest.raises(ValueError, match="from edge to edge"):
        check_whole_image(model, dataset)


def test_without_defects(images, loco, tmp_path):
    """Data that does not tell defects has no AUC-sPRO; that whose configuration is lost warns."""
    datamodule = MVTecAD(images, "cloth", 4, 4, num_workers=0)
    with pytest.raises(ValueError, match="SPRO needs a data set that tells the defects of its images"):
        run(model_of(GroupEvaluator(test_metrics=pixel.SPRO())), datamodule, tmp_path)
    with pytest.warns(UserWarning, match="pixel_SPRO is left out. There is no file .*defects_config.json"):
        metrics, _, _ = run(model_of(GroupEvaluator()), loco, tmp_path)
    assert "pixel_SPRO" not in metrics
    with pytest.raises(FileNotFoundError, match=r"There is no file .*defects_config.json"):
        run(model_of(GroupEvaluator(test_metrics=pixel.SPRO())), loco, tmp_path)


def test_without_post_processor(tray, tmp_path):
    """There are no masks to score then."""
    metrics = [metric for metric in default_test_metrics() if metric.name.startswith("pixel")]
    evaluator = GroupEvaluator(test_metrics=metrics, map_size="original")
    metrics, _, _ = run(model_of(evaluator, post_processor=False), tray, tmp_path)
    assert "pixel_SPRO" in metrics
    assert "pixel_F1Score" not in metrics


def test_the_trainer_is_left_as_it_was(tray, tmp_path):
    evaluator = GroupEvaluator(test_metrics=[*default_test_metrics(), F1Score(fields=["pred_mask", "gt_mask"])])
    model = model_of(evaluator)
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, logger=False)
    first = engine.test(model, datamodule=tray)[0]
    assert evaluator._raw not in engine.trainer.callbacks
    assert engine.test(model, datamodule=tray)[0] == first


def test_bits():
    mask = torch.rand(13, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(Bits.of(mask).mask(), mask)
    assert Bits.of(mask).bits.nbytes == 12


def test_mask_files(tmp_path):
    for name in ("1.png", "0.png"):
        (tmp_path / name).touch()
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    assert mask_files(str(tmp_path), "image") == files
    assert mask_files(list(map(str, files)), "image") == files
    assert mask_files(str(files[0]), "image") == files[:1]
    for nothing in ("", None, float("nan"), []):
        with pytest.raises(ValueError, match="The anomalous image image has no mask"):
            mask_files(nothing, "image")


def test_unknown_size():
    with pytest.raises(ValueError, match="map_size must be 'input' or 'original', got 'large'"):
        GroupEvaluator(map_size="large")
