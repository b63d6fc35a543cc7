import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import ddp_run
import numpy as np
import pytest
import torch
from anomalib.data import Folder, MVTecAD, MVTecLOCO
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max, F1Score
from anomalib.models import Patchcore
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from rich.console import Console
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score
from tiny_model import RawScores, TinyModel
from torch.utils.data import DataLoader
from waiting import TIMEOUT

from anomalib_pack.metrics import GroupEvaluator, default_test_metrics, pixel
from anomalib_pack.metrics.roc import roc_corners
from anomalib_pack.metrics.tables import MAD_METRICS, rich_table, with_mad
from anomalib_pack.post_processing import RankPreservingPostProcessor

METRIC_NAMES = [
    *("image_AUROC", "image_AP", "image_F1Max", "image_F1Score"),
    *("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_F1Score", "pixel_AUPRO"),
]
DEFAULT_NAMES = [*METRIC_NAMES, "mAD"]


def mvtec(images, val_split_mode="from_train"):
    return MVTecAD(images, "cloth", 4, 4, num_workers=0, val_split_mode=val_split_mode, val_split_ratio=0.3, seed=0)


def train_and_test(model, datamodule, results, max_epochs=1):
    """Test results, raw scores and engine of a real run."""
    raw = RawScores()
    engine = Engine(
        callbacks=[raw],
        accelerator="cpu",
        max_epochs=max_epochs,
        default_root_dir=results,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    engine.fit(model, datamodule=datamodule)
    return engine.test(model, datamodule=datamodule)[0], raw, engine


def tiny_model(post_processor, evaluator=True):
    seed_everything(0)
    return TinyModel(post_processor=post_processor, evaluator=evaluator)


def patchcore(post_processor, evaluator=True):
    seed_everything(0)
    return Patchcore(
        backbone="resnet18",
        pre_trained=False,
        coreset_sampling_ratio=0.05,
        pre_processor=Patchcore.configure_pre_processor((64, 64)),
        post_processor=post_processor,
        evaluator=evaluator,
        visualizer=False,
    )


def errors(metrics, raw):
    """Differences of image and pixel AUROC from scikit-learn's on raw scores."""
    _, scores, maps, labels, masks = raw.arrays()
    return [
        abs(metrics["image_AUROC"] - roc_auc_score(labels, scores)),
        abs(metrics["pixel_AUROC"] - roc_auc_score(masks.ravel() > 0, maps.ravel())),
    ]


@pytest.mark.parametrize("build", [tiny_model, patchcore])
def test_auroc_with_normal_validation_is_that_of_raw_scores(build, images, tmp_path):
    metrics, raw, _ = train_and_test(build(RankPreservingPostProcessor()), mvtec(images), tmp_path / "ours")
    assert max(errors(metrics, raw)) < 1e-4
    metrics, raw, _ = train_and_test(build(PostProcessor()), mvtec(images), tmp_path / "stock")
    assert max(errors(metrics, raw)) > 1e-2


def test_auroc_of_scores_in_the_tens_is_that_of_raw_scores(images, tmp_path):
    """Stock scores that are not normalised saturate in the sigmoid of torchmetrics."""
    datamodule = mvtec(images, "same_as_test")
    metrics, raw, _ = train_and_test(tiny_model(RankPreservingPostProcessor()), datamodule, tmp_path / "ours")
    assert min(raw.arrays()[1]) > 20
    assert max(errors(metrics, raw)) < 1e-4
    stock = tiny_model(PostProcessor(enable_normalization=False))
    metrics, raw, _ = train_and_test(stock, datamodule, tmp_path / "stock")
    assert max(errors(metrics, raw)) > 1e-2


@pytest.fixture(scope="module")
def by_folder(images, tmp_path_factory):
    """Run with groups by folder."""
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator(group_by="folder"))
    return *train_and_test(model, mvtec(images), tmp_path_factory.mktemp("by_folder")), model


def f1_max(truth, scores):
    precision, recall, _ = precision_recall_curve(truth, scores)
    return (2 * precision * recall / (precision + recall + 1e-30)).max()


def test_groups_are_subsets(by_folder):
    metrics, raw, engine, model = by_folder
    paths, scores, maps, labels, masks = raw.arrays()
    folders = np.array([Path(path).parent.name for path in paths])
    predicted = scores >= model.post_processor.raw_image_threshold.item()
    predicted_masks = maps >= model.post_processor.raw_pixel_threshold.item()
    for group in ("hole", "stain"):
        chosen = (folders == group) | (folders == "good")
        truth = masks[chosen].ravel() > 0
        expected = {
            "image_AUROC": roc_auc_score(labels[chosen], scores[chosen]),
            "image_AP": average_precision_score(labels[chosen], scores[chosen]),
            "image_F1Max": f1_max(labels[chosen], scores[chosen]),
            "image_F1Score": f1_score(labels[chosen], predicted[chosen]),
            "pixel_AUROC": roc_auc_score(truth, maps[chosen].ravel()),
            "pixel_AP": average_precision_score(truth, maps[chosen].ravel()),
            "pixel_F1Max": f1_max(truth, maps[chosen].ravel()),
            "pixel_F1Score": f1_score(truth, predicted_masks[chosen].ravel()),
        }
        for name, value in expected.items():
            assert metrics[f"{name}_{group}"] == pytest.approx(value, abs=1e-4)
    assert metrics["pixel_AUPRO_hole"] > metrics["pixel_AUPRO_stain"]
    for name in DEFAULT_NAMES:
        mean = (metrics[f"{name}_hole"] + metrics[f"{name}_stain"]) / 2
        assert metrics[f"{name}_mean"] == pytest.approx(mean, abs=1e-6)
    assert set(metrics) == {f"{name}{end}" for name in DEFAULT_NAMES for end in ("", "_hole", "_stain", "_mean")}
    assert {name: value.item() for name, value in engine.trainer.callback_metrics.items()} == metrics


def test_overall_is_that_of_the_stock_evaluator(by_folder, images, tmp_path):
    maps = {"fields": ["anomaly_map", "gt_mask"], "prefix": "stock_"}
    theirs = {"pixel_AUROC": AUROC, "pixel_AP": AUPR, "pixel_F1Max": F1Max, "pixel_AUPRO": AUPRO}
    test_metrics = [*default_test_metrics(), *(metric(**maps) for metric in theirs.values())]
    model = tiny_model(RankPreservingPostProcessor(), Evaluator(test_metrics=test_metrics))
    stock, _, _ = train_and_test(model, mvtec(images), tmp_path)
    for name in METRIC_NAMES:
        assert stock[name] == by_folder[0][name]
    for name, metric in theirs.items():
        assert stock[f"stock_{metric.__name__}"] == pytest.approx(by_folder[0][name], abs=1e-6)


def test_pixels_are_sorted_once_for_all_metrics(images, tmp_path, monkeypatch):
    """Overall and for two groups; metrics on other fields have pixels of their own."""
    lengths = []
    monkeypatch.setattr(pixel, "roc_corners", lambda *scores: lengths.append(len(scores[1])) or roc_corners(*scores))
    other = pixel.AUROC(fields=["pred_mask", "gt_mask"], prefix="mask_")
    evaluator = GroupEvaluator(test_metrics=[*default_test_metrics(), other], group_by="folder")
    metrics, _, _ = train_and_test(tiny_model(RankPreservingPostProcessor(), evaluator), mvtec(images), tmp_path)
    assert len(lengths) == 6
    assert metrics["mask_AUROC_hole"] != metrics["pixel_AUROC_hole"]


def test_mad_is_the_mean_of_seven_metrics(by_folder):
    metrics = by_folder[0]
    for end in ("", "_hole", "_stain", "_mean"):
        seven = [metrics[f"{name}{end}"] for name in METRIC_NAMES if not name.endswith("F1Score")]
        assert len(seven) == 7
        assert metrics[f"mAD{end}"] == pytest.approx(np.mean(seven), abs=1e-6)


def test_mad_of_a_published_row():
    """MiniMaxAD on MVTec AD, multi-class, in Table 3 of its paper; F1 scores at a threshold do not count."""
    image = {"image_AUROC": 98.8, "image_AP": 99.6, "image_F1Max": 97.7}
    row = image | {"pixel_AUROC": 96.1, "pixel_AP": 58.5, "pixel_F1Max": 59.5, "pixel_AUPRO": 92.2}
    assert round(with_mad({"image_F1Score": 1.0} | row)["mAD"], 1) == 86.1
    for name in row:
        assert "mAD" not in with_mad({other: value for other, value in row.items() if other != name})


def test_csv(by_folder):
    metrics, _, engine, _ = by_folder
    with (Path(engine.trainer.default_root_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["overall", "hole", "stain", "mean"]
    for row in rows:
        group = row.pop("group")
        assert list(row) == DEFAULT_NAMES
        for name, value in row.items():
            key = name if group == "overall" else f"{name}_{group}"
            assert float(value) == pytest.approx(metrics[key], abs=1e-6)


def test_checkpoint_loads_with_the_stock_evaluator(by_folder):
    _, _, engine, model = by_folder
    loaded = TinyModel.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    assert type(loaded.evaluator) is Evaluator
    assert torch.equal(loaded.model.encode.weight, model.model.encode.weight)


def test_batches_without_group(images, tmp_path, capsys):
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator())
    metrics, _, engine = train_and_test(model, mvtec(images), tmp_path)
    assert list(metrics) == DEFAULT_NAMES
    assert not (Path(engine.trainer.default_root_dir) / "metrics.csv").exists()
    assert "Test metrics per group" not in capsys.readouterr().out


def test_metrics_of_the_user_per_group(images, tmp_path, capsys):
    evaluator = GroupEvaluator(
        val_metrics=AUROC(fields=["pred_score", "gt_label"], prefix="val_"),
        test_metrics=[
            AUPR(fields=["pred_score", "gt_label"]),
            F1Max(fields=["pred_score", "gt_label"], prefix="image_"),
        ],
        group_by="folder",
    )
    model = tiny_model(RankPreservingPostProcessor(), evaluator)
    metrics, _, engine = train_and_test(model, mvtec(images, "same_as_test"), tmp_path)
    names = {f"{name}{end}" for name in ("AUPR", "image_F1Max") for end in ("", "_hole", "_stain", "_mean")}
    assert set(metrics) == names
    lines = capsys.readouterr().out.splitlines()
    groups = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in {"hole", "stain", "mean"}]
    assert groups == ["hole", "stain", "mean"]
    assert any("DataLoader" in line for line in lines)
    assert "mean" in lines[-2]  # after Lightning's table
    assert engine.validate(model, datamodule=mvtec(images, "same_as_test"))[0].keys() == {"val_AUROC"}
    assert "mean" not in capsys.readouterr().out


def test_table_fits_a_narrow_terminal(capsys):
    """Eleven values of MVTec AD's longest categories in 80 columns; the groups of MVTec LOCO wrap between words."""
    names = [*METRIC_NAMES, "pixel_SPRO", "mAD"]
    row = dict.fromkeys(names, 0.98765) | {"image_AUROC": 1.0}
    rows = dict.fromkeys(("", "metal_nut", "toothbrush", "transistor", "mean"), row)
    Console(width=80).print(rich_table(rows))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    values = ["100.0", *["98.8"] * 10]
    assert [name.split("_")[-1].replace("F1Score", "Score") for name in names] == lines[4][1:]
    assert lines[3] == [*["image"] * 3, "F1", *["pixel"] * 3, "F1", *["pixel"] * 2]
    assert [line for line in lines if line[-1] == "98.8"] == [
        ["metal", "nut", *values],
        ["toothbrush", *values],
        ["transistor", *values],
        ["mean", *values],
    ]
    groups = ("structural_anomalies", "splicing_connectors/logical_anomalies")
    Console(width=80).print(rich_table(dict.fromkeys(("", *groups, "mean"), row)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    words = ["structural", "anomalies", "splicing", "connectors", "logical", "anomalies", "mean"]
    assert [line[0] for line in lines if line[0] in words] == words
    assert ["anomalies", *values] in lines


def test_groups_of_a_loco_dataset(loco, tmp_path):
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator())
    metrics, raw, _ = train_and_test(model, loco, tmp_path / "results")
    paths, scores, _, labels, _ = raw.arrays()
    folders = np.array([Path(path).parent.name for path in paths])
    for group in ("logical_anomalies", "structural_anomalies"):
        chosen = (folders == group) | (folders == "good")
        expected = roc_auc_score(labels[chosen], scores[chosen])
        assert metrics[f"image_AUROC_{group}"] == pytest.approx(expected, abs=1e-4)
    assert metrics["image_AUROC_logical_anomalies"] != metrics["image_AUROC_structural_anomalies"]


def metrics_of_one_label(loco, anomalous, results, group=None):
    """Metrics of the test images with one label, all of one group."""
    loco.setup()
    dataset = loco.test_data
    dataset.samples = dataset.samples[dataset.samples.label_index == anomalous].reset_index(drop=True)

    def collate(items):
        batch = dataset.collate_fn(items)
        batch.group = group and [group] * batch.batch_size
        return batch

    loader = DataLoader(dataset, batch_size=4, collate_fn=collate)
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator())
    engine = Engine(accelerator="cpu", default_root_dir=results, enable_progress_bar=False)
    return engine.test(model, dataloaders=loader)[0]


@pytest.mark.parametrize(("anomalous", "missing"), [(True, "normal"), (False, "anomalous")])
def test_incomplete_group_is_left_out(anomalous, missing, loco, tmp_path):
    with pytest.warns(UserWarning, match=f"Group 'board' has no {missing} test images"):
        metrics = metrics_of_one_label(loco, anomalous, tmp_path, group="board")
    assert not [name for name in metrics if "board" in name]


def test_overall_metrics_without_anomalous_images_do_not_exist(loco, tmp_path):
    with pytest.warns(UserWarning, match=r"no anomalous test images: image_AUROC, .*, pixel_SPRO do not exist"):
        metrics = metrics_of_one_label(loco, False, tmp_path)
    assert not metrics


def test_overall_metrics_without_normal_images(loco, tmp_path):
    """Labels of one kind rank nothing; the masks have normal pixels all the same."""
    with pytest.warns(UserWarning, match=r"no normal test images: image_AUROC, .*, image_F1Score do not exist"):
        metrics = metrics_of_one_label(loco, True, tmp_path)
    assert set(metrics) == {name for name in DEFAULT_NAMES if name.startswith("pixel")}


def test_data_without_masks_have_metrics_of_images_and_no_warning(images, tmp_path, recwarn):
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/hole"}
    datamodule = Folder("cloth", root=images / "cloth", num_workers=0, **folders)
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator())
    metrics, _, _ = train_and_test(model, datamodule, tmp_path)
    assert set(metrics) == {name for name in DEFAULT_NAMES if name.startswith("image")}
    assert not [each for each in recwarn if "compute" in str(each.message)]


def test_data_without_groups_name_those_with_them(loco, tmp_path):
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator())
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "results", enable_progress_bar=False)
    anomalibs = MVTecLOCO(loco.root, loco.category, eval_batch_size=4, num_workers=0)
    anomalibs.setup = lambda stage=None: None  # which fails with pandas 3
    loco.setup()
    anomalibs.test_data = loco.test_data
    with pytest.warns(UserWarning, match="MVTecLoco, with small letters"):
        engine.test(model, datamodule=anomalibs)


def test_metrics_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"test_metrics must have different names, .* got pixel_AUPRO twice"):
        GroupEvaluator(test_metrics=[*default_test_metrics(), pixel.AUPRO(prefix="pixel_")])
    with pytest.raises(ValueError, match=r"val_metrics must have different names"):
        GroupEvaluator(val_metrics=[AUROC(fields=["pred_score", "gt_label"]), AUROC(fields=["anomaly_map", "gt_mask"])])


def test_validation_metrics_of_labels_are_refused():
    """Anomalib's post-processor predicts them in tests only."""
    for field, truth in (("pred_label", "gt_label"), ("pred_mask", "gt_mask")):
        with pytest.raises(ValueError, match=f"must not need {field}, as val_F1Score does.* in tests only"):
            GroupEvaluator(val_metrics=F1Score(fields=[field, truth], prefix="val_"))
        GroupEvaluator(test_metrics=F1Score(fields=[field, truth]))


def test_another_limit_is_part_of_the_name(loco, tmp_path):
    metrics = [*default_test_metrics(), pixel.AUPRO(fpr_limit=0.05, prefix="pixel_", strict=False)]
    loco.setup()
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator(test_metrics=metrics))
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    values = engine.test(model, dataloaders=loco.test_dataloader())[0]
    assert values["pixel_AUPRO"] != values["pixel_AUPRO_0.05"]
    assert values["mAD"] == pytest.approx(np.mean([values[name] for name in MAD_METRICS]))


def test_csv_of_a_run_without_logger(loco, tmp_path):
    """Nothing but the evaluator writes to its folder, which thus does not exist."""
    loco.setup()
    model = tiny_model(RankPreservingPostProcessor(), GroupEvaluator())
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "new", logger=False, enable_progress_bar=False)
    engine.test(model, dataloaders=loco.test_dataloader())
    assert (Path(engine.trainer.default_root_dir) / "metrics.csv").exists()


def test_unknown_grouping():
    with pytest.raises(ValueError, match="group_by must be 'group' or 'folder', got 'category'"):
        GroupEvaluator(group_by="category")


def test_two_processes_give_what_one_gives(images, tmp_path, monkeypatch):
    """Each with an odd number of images, of which the distributed sampler repeats one."""
    monkeypatch.setattr(MVTecADDataset, "defects", None, raising=False)  # which the run sets
    command = [sys.executable, Path(__file__).with_name("ddp_run.py"), images, tmp_path, "2"]
    paths = os.pathsep.join([*map(str, Path(__file__).parents[1:3]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True, timeout=TIMEOUT)
    two = json.loads((tmp_path / "results.json").read_text())
    one = {mode: ddp_run.run(images, tmp_path / "one", 1, mode)[0] for mode in ("from_train", "same_as_test")}
    for val_split_mode in ("from_train", "same_as_test"):
        # Images come in other batches, whose convolutions may round otherwise.
        assert two[val_split_mode]["statistics"] == pytest.approx(one[val_split_mode]["statistics"], rel=1e-5)
        assert two[val_split_mode]["metrics"] == pytest.approx(one[val_split_mode]["metrics"], abs=1e-6)
        assert two[val_split_mode]["published"].keys() == {"hole", "stain", "mean", "images"}
        for name, values in two[val_split_mode]["published"].items():
            assert values == pytest.approx(one[val_split_mode]["published"][name], abs=1e-6)
        check_records(two[val_split_mode]["records"], one[val_split_mode]["records"])


def check_records(two, one):
    """The first of two processes has the records of both, in the data set's order."""
    assert two["files"] == one["files"] == ["metrics.csv", "test_defects.csv", "test_predictions.csv"]
    assert len(one["test_predictions"]) == 25
    assert len(one["test_defects"]) == len(one["coco"]["annotations"]) > 0
    for name in ("test_predictions", "test_defects"):
        paths = [row["image_path"] for row in one[name]]
        assert [row["image_path"] for row in two[name]] == paths
    scores = [[float(row["raw_score"]) for row in each["test_predictions"]] for each in (two, one)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert [row["area"] for row in two["test_defects"]] == [row["area"] for row in one["test_defects"]]
    assert two["coco"]["images"] == one["coco"]["images"]
