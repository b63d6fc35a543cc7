"""Maps in files: what the callback writes, and what `python -m anomalib_pack evaluate` makes of them."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from test_spro import GOLDEN, needs_golden
from tiny_model import RawScores, TinyModel
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_pack import __main__ as program
from anomalib_pack.callbacks import WriteMaps
from anomalib_pack.data import MultiCategory, MVTecLoco, SyntheticLoco
from anomalib_pack.evaluation.command import evaluate_maps, run
from anomalib_pack.evaluation.layout import place
from anomalib_pack.evaluation.submission import thresholds, write_submission
from anomalib_pack.metrics import GroupEvaluator
from anomalib_pack.metrics.original_size import at_size
from anomalib_pack.post_processing import RankPreservingPostProcessor

GROUPS = ("logical_anomalies", "structural_anomalies")
PIXEL_METRICS = ("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO", "pixel_SPRO")


def make_engine(folder, *callbacks):
    return Engine(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        logger=False,
    )


def read_json(path):
    return json.loads(path.read_text())


def read_csv(path):
    """Metrics by group."""
    with path.open(newline="") as file:
        return {row.pop("group"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}


# --- Writing and reading again ---


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A test at the original size of images that are larger than the model's input, and the folder of its results."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"image_size": 320, "num_train": 4, "num_val": 2, "num_test": 3}
    data = SyntheticLoco(folder / "data", num_workers=0, eval_batch_size=4, **sizes)
    model = TinyModel(post_processor=RankPreservingPostProcessor(), evaluator=GroupEvaluator(map_size="original"))
    raw = RawScores()
    engine = make_engine(folder / "results", raw, WriteMaps(folder / "maps"))
    engine.fit(model, datamodule=data)
    metrics = engine.test(model, datamodule=data)[0]
    return folder, metrics, raw, Path(engine.trainer.default_root_dir)


def test_written_maps_evaluate_to_what_the_run_reports(large):
    folder, metrics, _, results = large
    evaluate_maps(folder / "maps", MVTecLoco(folder / "data", "tray"), folder / "out")
    again = read_csv(folder / "out" / "tray_metrics.csv")
    assert list(again) == ["overall", *GROUPS, "mean"]
    for group, row in again.items():
        suffix = "" if group == "overall" else f"_{group}"
        for name in PIXEL_METRICS:
            assert row[name] == pytest.approx(metrics[name + suffix], abs=1e-6)
            assert 0 < row[name] < 1
    assert_close(read_json(folder / "out" / "tray_metrics.json"), read_json(results / "tray_metrics.json"))


def assert_close(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_close(value, second[key])
    else:
        assert first == pytest.approx(second, abs=1e-6)


def test_files_hold_the_models_own_maps_at_the_size_of_the_images(large):
    folder, _, raw, _ = large
    paths, _, maps, *_ = raw.arrays()
    assert len(paths) == 9
    for path, anomaly_map in zip(paths, maps, strict=True):
        written = tifffile.imread(
            folder / "maps" / "tray" / "test" / Path(path).parent.name / f"{Path(path).stem}.tiff"
        )
        assert written.dtype == np.float32
        assert written.shape == (320, 320)
        assert written.min() > 1  # not normalised: the tiny model's scores are in the tens
        np.testing.assert_array_equal(written, at_size(torch.from_numpy(anomaly_map), (320, 320)).numpy())
    assert sum(path.is_file() for path in (folder / "maps").rglob("*")) == 9


def test_default_folder_is_that_of_the_run(images, tmp_path):
    data = MVTecAD(images, "cloth", num_workers=0)
    engine = make_engine(tmp_path, WriteMaps())
    engine.test(TinyModel(), datamodule=data)
    maps = Path(engine.trainer.default_root_dir) / "maps" / "cloth" / "test"
    assert {path.name for path in maps.iterdir()} == {"good", "hole", "stain"}
    assert tifffile.imread(maps / "hole" / "003.tiff").shape == (32, 32)


def test_joined_categories_lie_apart(rendered, tmp_path):
    data = MultiCategory("MVTecLoco", rendered, num_workers=0, group_by="group")
    evaluator = GroupEvaluator(map_size="original")
    engine = make_engine(tmp_path, WriteMaps(tmp_path / "maps"))
    model = TinyModel(evaluator=evaluator, post_processor=RankPreservingPostProcessor())
    metrics = engine.test(model, datamodule=data)[0]
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"board", "tray"}
    evaluate_maps(tmp_path / "maps", data, tmp_path / "out")
    for category in ("board", "tray"):
        rows = read_csv(tmp_path / "out" / f"{category}_metrics.csv")
        for name in PIXEL_METRICS:
            for group in GROUPS:
                assert rows[group][name] == pytest.approx(metrics[f"{name}_{category}/{group}"], abs=1e-6)
    mean = read_csv(tmp_path / "out" / "metrics.csv")["mean"]
    assert mean["pixel_SPRO"] == pytest.approx(metrics["pixel_SPRO_mean"], abs=1e-6)


def test_maps_that_show_a_part_of_the_image_are_refused(images, tmp_path):
    model = TinyModel(pre_processor=TinyModel.configure_pre_processor())
    model.pre_processor.transform = Compose([Resize((40, 40)), CenterCrop(32)])
    with pytest.raises(ValueError, match="do not show images of size"):
        make_engine(tmp_path, WriteMaps()).test(model, datamodule=MVTecAD(images, "cloth", num_workers=0))


def test_without_datamodule(images, tmp_path):
    data = MVTecAD(images, "cloth", num_workers=0)
    data.setup()
    loader = DataLoader(data.test_data, collate_fn=data.test_data.collate_fn)
    with pytest.raises(ValueError, match="WriteMaps needs a datamodule"):
        make_engine(tmp_path, WriteMaps()).test(TinyModel(), dataloaders=loader)


@pytest.mark.parametrize(
    ("image", "root", "category", "expected"),
    [
        ("/data/loco/pushpins/test/good/000.png", "/data/loco", "pushpins", "pushpins/test/good/000"),
        ("/visa/visa_pytorch/candle/test/bad/1.2.JPG", "/visa", "candle", "candle/test/bad/1.2"),
        ("/data/bottle/bottle/test/bottle/000.png", "/data/bottle", "bottle", "bottle/test/bottle/000"),
        ("photos/bad/7.png", "photos", "screws", "screws/bad/7"),
        ("/elsewhere/loco/pushpins/test/good/000.png", "/data/loco", "pushpins", "pushpins/test/good/000"),
        ("/elsewhere/a/b/c/d.png", None, "screws", "screws/b/c/d"),
    ],
)
def test_places(image, root, category, expected):
    assert place(image, root, category).as_posix() == expected


def test_two_images_with_one_place(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    good = tmp_path / "data" / "cloth" / "test" / "good"
    shutil.copy(good / "000.png", good / "000.PNG")
    with pytest.raises(ValueError, match=r"good/000.\w+ and .*good/000.\w+ would have one map"):
        make_engine(tmp_path, WriteMaps()).test(TinyModel(), datamodule=MVTecAD(tmp_path / "data", "cloth"))


# --- MVTec AD 2 ---


@pytest.fixture
def cans(tmp_path):
    """A category in the layout of MVTec AD 2; test images have more contrast."""
    rng = np.random.default_rng(0)
    for folder in ("train/good", "validation/good", "test_private", "test_private_mixed"):
        for index in range(3):
            path = tmp_path / "data" / "can" / folder / f"{index:03}_regular.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            least = 100 if "good" in folder else 0
            Image.fromarray(rng.integers(least, 256 - least, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize("test_type", ["private", "private_mixed"])
def test_submission(cans, tmp_path, test_type):
    # Anomalib's own datamodule does not work with pandas 3.
    data = MultiCategory("MVTecAD2", cans, num_workers=0, dataset_args={"test_type": test_type})
    model = TinyModel(evaluator=False)
    engine = make_engine(tmp_path, WriteMaps(tmp_path / "maps"))
    engine.predict(model, datamodule=data)
    model.eval()

    @torch.no_grad()
    def expected(item):
        return at_size(model.model(model.pre_processor.transform(item.image)[None]).anomaly_map[0, 0], (40, 48)).numpy()

    validation = np.array([expected(item) for item in data.val_data]).astype(np.float64)
    for item in data.test_dataloader().dataset:
        scores, name = expected(item), Path(item.image_path).stem
        written = tifffile.imread(tmp_path / f"maps/anomaly_images/can/test_{test_type}/{name}.tiff")
        assert written.dtype == np.float16
        np.testing.assert_allclose(written, scores, rtol=1e-3)
        mask = np.array(Image.open(tmp_path / f"maps/anomaly_images_thresholded/can/test_{test_type}/{name}.png"))
        exceeds = scores > validation.mean() + 3 * validation.std()
        assert exceeds.any()
        np.testing.assert_array_equal(mask, exceeds * np.uint8(255))
    assert sum(path.is_file() for path in (tmp_path / "maps").rglob("*")) == 6


def test_submission_without_normal_validation_images(cans, tmp_path):
    shutil.rmtree(cans / "can" / "validation")
    data = MultiCategory("MVTecAD2", cans, num_workers=0, dataset_args={"test_type": "private"})
    with pytest.raises(ValueError, match="has no normal images"):
        make_engine(tmp_path, WriteMaps()).predict(TinyModel(evaluator=False), datamodule=data)


def test_threshold_by_hand():
    maps = [("a", torch.tensor([[0.0, 2.0]])), ("b", torch.tensor([[10.0]])), ("a", torch.tensor([[4.0, 6.0]]))]
    found = thresholds(maps)
    assert found["a"] == pytest.approx(3 + 3 * 5**0.5)


def test_scores_that_float16_cannot_tell_apart():
    with pytest.warns(UserWarning, match="of can have mean 1000 and .* by steps of 0.5"):
        thresholds([("can", torch.tensor([[999.9, 1000.1]]))])
    with pytest.raises(ValueError, match="000 must be finite in float16"):
        write_submission(Path("nowhere"), Path("can/test_private/000"), torch.tensor([[1e5]]), 0.0)


# --- Evaluating ---


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The root of small renderings of two categories."""
    root = tmp_path_factory.mktemp("rendered")
    for category in ("tray", "board"):
        SyntheticLoco(root, category, image_size=64, num_train=1, num_val=1, num_test=2).prepare_data()
    return root


@pytest.fixture
def maps(rendered, tmp_path):
    """Noise for each test image, a little higher in masks."""
    rng = np.random.default_rng(0)
    for image in sorted(rendered.glob("*/test/*/*.png")):
        scores = rng.normal(50, 10, (64, 64)).astype(np.float32)
        category, _, group, _ = image.parts[-4:]
        for mask in (rendered / category / "ground_truth" / group / image.stem).glob("*"):
            scores += 20 * (np.array(Image.open(mask)) > 0)
        path = tmp_path / "maps" / image.relative_to(rendered).with_suffix(".tiff")
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, scores)
    return tmp_path / "maps"


def evaluate(maps, root, *arguments):
    """Run the command and return the folder of its results."""
    out = maps.parent / "out"
    run(["--maps", str(maps), "--data", "MVTecLoco", "--data.root", str(root), "--out", str(out), *arguments])
    return out


def test_metrics_of_a_group_by_scikit_learn(maps, rendered):
    row = read_csv(evaluate(maps, rendered, "--data.category", "tray") / "tray_metrics.csv")["logical_anomalies"]
    scores, masks, maxima, labels = [], [], [], []
    for group in ("good", "logical_anomalies"):
        for path in sorted((maps / "tray" / "test" / group).iterdir()):
            scores.append(tifffile.imread(path))
            mask = np.zeros((64, 64), bool)
            for file in (rendered / "tray" / "ground_truth" / group / path.stem).glob("*"):
                mask |= np.array(Image.open(file)) > 0
            masks.append(mask)
            maxima.append(scores[-1].max())
            labels.append(mask.any())
    scores, masks = np.ravel(scores), np.ravel(masks)
    assert row["pixel_AUROC"] == pytest.approx(roc_auc_score(masks, scores), abs=1e-9)
    assert row["pixel_AP"] == pytest.approx(average_precision_score(masks, scores), abs=1e-9)
    assert row["image_AUROC"] == pytest.approx(roc_auc_score(labels, maxima), abs=1e-9)
    assert row["image_AP"] == pytest.approx(average_precision_score(labels, maxima), abs=1e-9)


class TestPublished:
    pytestmark = needs_golden

    def test_files(self, tmp_path):
        """Maps and ground truth of the published evaluation, as files."""
        about = read_json(GOLDEN.with_suffix(".json"))
        part = tmp_path / "data" / "part"
        for folder in ("train/good", "validation/good"):
            save(part / folder / "000.png", np.zeros((48, 64, 3), np.uint8))
        (part / "defects_config.json").write_text(json.dumps(about["defects_config"]))
        with np.load(GOLDEN, allow_pickle=False) as file:
            for image in about["images"]:
                group, name = image["group"], image["image_id"]
                save(part / "test" / group / f"{name}.png", np.zeros((48, 64, 3), np.uint8))
                path = tmp_path / "maps" / "part" / "test" / group / f"{name}.tiff"
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(path, file[f"map/{image['index']}"])
                for number in range(image["masks"]):
                    mask = file[f"mask/{image['index']}/{number}"].astype(np.uint8)
                    save(part / "ground_truth" / group / name / f"{number:03}.png", mask)
        out = evaluate(tmp_path / "maps", tmp_path / "data", "--data.category", "part")
        found = read_json(out / "part_metrics.json")
        assert_close(found["localization"]["auc_spro"], about["auc_spro_exact"])


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_all_categories_and_their_mean(maps, rendered, capsys):
    out = evaluate(maps, rendered, "--categories", "all")
    rows = read_csv(out / "metrics.csv")
    assert list(rows) == ["board", "tray", "mean"]
    for category in ("board", "tray"):
        published = read_json(out / f"{category}_metrics.json")["localization"]["auc_spro"]["mean"]["0.05"]
        assert rows[category]["pixel_SPRO"] == pytest.approx(published, abs=1e-12)
    assert rows["mean"]["mAD"] == pytest.approx((rows["board"]["mAD"] + rows["tray"]["mAD"]) / 2)
    printed = capsys.readouterr().out
    assert [title in printed for title in ("Groups of board", "Groups of tray", "Categories")] == [True] * 3


def test_one_of_a_list_of_categories_is_as_alone(maps, rendered):
    alone = read_json(evaluate(maps, rendered, "--data.category", "tray") / "tray_metrics.json")
    shutil.rmtree(maps.parent / "out")
    out = evaluate(maps, rendered, "--categories", "[tray]")
    assert {path.name for path in out.iterdir()} == {"tray_metrics.json", "tray_metrics.csv", "metrics.csv"}
    assert read_json(out / "tray_metrics.json") == alone


def test_images_are_not_decoded(maps, rendered, tmp_path):
    """What follows the size in the files of the images may be missing."""
    before = read_json(evaluate(maps, rendered, "--data.category", "tray") / "tray_metrics.json")
    shutil.copytree(rendered / "tray", tmp_path / "cut" / "tray")
    for path in (tmp_path / "cut").glob("tray/*/*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    assert read_json(evaluate(maps, tmp_path / "cut", "--data.category", "tray") / "tray_metrics.json") == before


def test_data_without_defects_have_aupro_under_its_own_key(images, tmp_path):
    data = MVTecAD(images, "cloth", num_workers=0)
    model = TinyModel(post_processor=RankPreservingPostProcessor(), evaluator=GroupEvaluator(map_size="original"))
    engine = make_engine(tmp_path, WriteMaps(tmp_path / "maps"))
    metrics = engine.test(model, datamodule=data)[0]
    evaluate_maps(tmp_path / "maps", MVTecAD(images, "cloth"), tmp_path / "out")
    row = read_csv(tmp_path / "out" / "cloth_metrics.csv")["overall"]
    for name in PIXEL_METRICS[:-1]:
        assert row[name] == pytest.approx(metrics[name], abs=1e-6)
    published = read_json(tmp_path / "out" / "cloth_metrics.json")
    assert published["localization"]["au_pro"]["mean"]["0.3"] == pytest.approx(row["pixel_AUPRO"], abs=1e-12)
    assert published["classification"]["auc_roc"] == {"mean": row["image_AUROC"]}


def test_folder_with_other_characters_than_those_of_ascii(tmp_path):
    root = tmp_path / "Prüfteile"
    rng = np.random.default_rng(0)
    for index in range(2):
        for kind in ("good", "bad", "fine"):
            save(root / kind / f"{index}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        save(root / "masks" / f"{index}.png", np.pad(np.full((4, 4), 255, np.uint8), 6))
        for kind in ("bad", "fine"):
            path = tmp_path / "maps" / "part" / kind / f"{index}.tiff"
            path.parent.mkdir(parents=True, exist_ok=True)
            scores = np.pad(np.ones((4, 4), np.float32), 6) * (kind == "bad") + rng.uniform(0, 0.5, (16, 16))
            tifffile.imwrite(path, scores)
    data = Folder("part", "good", root, "bad", "fine", "masks")
    evaluate_maps(tmp_path / "maps", data, tmp_path / "out")
    assert read_csv(tmp_path / "out" / "part_metrics.csv")["overall"]["pixel_AUPRO"] == 1


def test_without_defects_config(maps, rendered, tmp_path):
    shutil.copytree(rendered / "tray", tmp_path / "data" / "tray")
    config = tmp_path / "data" / "tray" / "defects_config.json"
    config.write_text("[]")
    with pytest.raises(ValueError, match="has pixel value"):
        evaluate(maps, tmp_path / "data", "--data.category", "tray")
    config.unlink()
    with pytest.warns(UserWarning, match=f"AUPRO is in its place. There is no file {config}"):
        out = evaluate(maps, tmp_path / "data", "--data.category", "tray")
    published = read_json(out / "tray_metrics.json")["localization"]
    rows = read_csv(out / "tray_metrics.csv")
    assert published.keys() == {"au_pro"}
    assert "pixel_SPRO" not in rows["mean"]
    for group in (*GROUPS, "mean"):
        assert published["au_pro"][group]["0.3"] == pytest.approx(rows[group]["pixel_AUPRO"], abs=1e-12)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_other_files_than_tiff(maps, rendered, suffix):
    rounded = {path: np.round(tifffile.imread(path)) for path in maps.rglob("*.tiff")}
    for path, scores in rounded.items():
        tifffile.imwrite(path, scores)
    before = read_json(evaluate(maps, rendered, "--data.category", "tray") / "tray_metrics.json")
    for path, scores in rounded.items():
        path.unlink()
        if suffix == ".png":
            save(path.with_suffix(suffix), scores.astype(np.uint8))
        else:
            tifffile.imwrite(path.with_suffix(suffix), scores.astype(np.float16), compression="zlib")
    assert read_json(evaluate(maps, rendered, "--data.category", "tray") / "tray_metrics.json") == before


def nan(path):
    scores = tifffile.imread(path)
    scores[3, 4] = np.nan
    tifffile.imwrite(path, scores)


DAMAGES = {
    r"1 of 6 test images have no map, .*good/001.png.* would be .*good/001.tiff": Path.unlink,
    r"there are .*good/001.tiff and .*good/001.tif\.": lambda path: shutil.copy(path, path.with_suffix(".tif")),
    r"good/001.tiff has size \(64, 32\) .*, its image .*good/001.png has \(64, 64\)": lambda path: tifffile.imwrite(
        path, np.zeros((64, 32), np.float32)
    ),
    r"good/001.tiff has 1 NaN among its 4096 values": nan,
    r"good/001.tiff must have one real number for each pixel, got shape \(64, 64, 3\)": lambda path: tifffile.imwrite(
        path, np.zeros((64, 64, 3), np.uint8), photometric="rgb"
    ),
    r"Cannot read .*good/001.tiff": lambda path: path.write_bytes(b"no map"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_bad_map_is_named(maps, rendered, message):
    DAMAGES[message](maps / "tray" / "test" / "good" / "001.tiff")
    with pytest.raises((OSError, ValueError), match=message):
        evaluate(maps, rendered, "--data.category", "tray")
    assert not (maps.parent / "out").exists()


def test_command_prints_errors_without_a_traceback(maps, rendered, monkeypatch, capsys):
    (maps / "tray" / "test" / "good" / "001.tiff").unlink()
    arguments = ["--maps", str(maps), "--data", "MVTecLoco", "--data.root", str(rendered), "--out", str(maps.parent)]
    monkeypatch.setattr("sys.argv", ["anomalib_pack", "evaluate", *arguments, "--data.category", "tray"])
    assert program.main() == 1
    assert capsys.readouterr().err.startswith("error: 1 of 6 test images have no map")


def test_images_without_ground_truth(cans, tmp_path):
    data = MultiCategory("MVTecAD2", cans, dataset_args={"test_type": "private"})
    with pytest.raises(ValueError, match="test images of can have no ground truth"):
        evaluate_maps(tmp_path, data, tmp_path / "out")
