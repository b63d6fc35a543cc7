"""What a sweep keeps of its runs, and whether the difference of two models is more than chance."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score
from sweep_runs import TINY, sweep

from anomalib_pack.sweep import Sweep, comparison
from anomalib_pack.sweep.comparison import Comparison, Images, bootstrap, draws, mean_of
from anomalib_pack.sweep.results import read_rows


def made(seed: int, normal: int, anomalous: int, seeds: int = 1, digits: int = 1) -> Images:
    """Scores of two models that agree in part, with ties."""
    rng = np.random.default_rng(seed)
    labels = np.array([False] * normal + [True] * anomalous)
    common = rng.normal(size=len(labels)) + labels
    noise = rng.normal(size=(2, seeds, len(labels))) * np.array([0.5, 1.0])[:, None, None]
    return Images(labels, np.round(common + noise, digits))


def test_resamples_are_those_of_a_loop(monkeypatch) -> None:
    """Each replicate is the difference of scikit-learn's AUROCs over the images that are drawn, mean over seeds."""
    monkeypatch.setattr(comparison, "RESAMPLES", 70)
    monkeypatch.setattr(comparison, "CHUNK", 30)
    images = made(seed=0, normal=9, anomalous=13, seeds=3)
    found = bootstrap(images, np.random.default_rng(7))

    def area(model: int, counts: np.ndarray) -> float:
        scores = images.scores[model]
        return np.mean([roc_auc_score(images.labels, seed, sample_weight=counts) for seed in scores])

    rng, expected = np.random.default_rng(7), []
    for chunk in (30, 30, 10):
        anomalous, normal = draws(13, chunk, rng), draws(9, chunk, rng)
        counts = np.concatenate([normal, anomalous], axis=1)  # as the labels are ordered
        expected += [area(0, each) - area(1, each) for each in counts]
    np.testing.assert_allclose(found.replicates, expected, atol=1e-6)
    assert found.areas == pytest.approx([area(0, np.ones(22)), area(1, np.ones(22))])
    low, high = found.interval
    assert (np.mean(found.replicates < low), np.mean(found.replicates > high)) == pytest.approx(
        (0.025, 0.025), abs=0.02
    )


def test_many_images() -> None:
    """The limit for many images: DeLong's variance of the difference of two AUROCs on the same images."""
    images = made(seed=1, normal=500, anomalous=700, digits=6)
    found = bootstrap(images, np.random.default_rng(0))
    wins = [
        (model[0][images.labels][:, None] > model[0][~images.labels][None]).astype(float) for model in images.scores
    ]
    apart = wins[0] - wins[1]
    variance = apart.mean(axis=1).var(ddof=1) / 700 + apart.mean(axis=0).var(ddof=1) / 500
    assert found.replicates.std() == pytest.approx(variance**0.5, rel=0.05)
    assert found.difference == pytest.approx(apart.mean())
    expected = apart.mean() + np.array([-1.96, 1.96]) * variance**0.5
    assert found.interval == pytest.approx(expected, abs=0.1 * variance**0.5)


def test_the_interval_covers() -> None:
    """Two models that are equally good: 0 is outside of about one interval in twenty."""
    outside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = np.array([False] * 60 + [True] * 60)
        images = Images(labels, rng.normal(size=(2, 1, 120)) + labels)
        low, high = Comparison((0, 0), bootstrap_quickly(images)).interval
        outside += not low <= 0 <= high
    assert 3 <= outside <= 20  # 99.5 % of the binomial distribution of 200 and 0.05


def bootstrap_quickly(images: Images) -> np.ndarray:
    resamples = comparison.RESAMPLES
    comparison.RESAMPLES = 500
    try:
        return bootstrap(images, np.random.default_rng(0)).replicates
    finally:
        comparison.RESAMPLES = resamples


def test_mean_of_categories() -> None:
    """Categories are resampled on their own, so the mean of two alike varies less."""
    parts = [bootstrap(made(seed=3, normal=80, anomalous=80), np.random.default_rng(seed)) for seed in range(2)]
    mean = mean_of(parts)
    assert mean.difference == pytest.approx(parts[0].difference)
    assert mean.replicates.std() == pytest.approx(parts[0].replicates.std() / 2**0.5, rel=0.05)


def compare(folder: Path, *names, options=()) -> int:
    """Run the command; return its exit status."""
    arguments = ["--config", folder / "sweep.yaml", "--compare", *names, *options]
    try:
        Sweep().run(Sweep.get_parser().parse_args([*map(str, arguments)]))
    except SystemExit as stop:
        return stop.code
    return 0


def test_compare(here: Path, tray, capfd) -> None:
    """The scores of all runs are kept; two models of a sweep are compared by their names in its tables."""
    keeps_ranks = {"class_path": "anomalib_pack.post_processing.RankPreservingPostProcessor"}
    tiny = TINY | {"init_args": TINY["init_args"] | {"post_processor": keeps_ranks}}
    blind = {"class_path": "sweep_models.Blind", "seeds": [0, 1]}
    config = {"models": [tiny, blind], "data": [tray], "seeds": [0, 1, 2], "trainer": {"max_epochs": 1}}
    (here / "sweep.yaml").write_text(yaml.safe_dump(config))
    assert compare(here, "TinyModel", "Blind") == 2
    assert "4 runs are missing" in capfd.readouterr().err  # seed 2 is not compared
    status, results, rows = sweep(here, config)
    assert status == 0
    for (model, *_), row in rows.items():
        with (results / "predictions" / row["job"] / "test_predictions.csv").open(newline="") as file:
            images = list(csv.DictReader(file))
        assert len(images) == 12
        labels = [int(image["gt_label"]) for image in images]
        scores = [float(image["raw_score"]) for image in images]
        area = roc_auc_score(labels, scores)
        assert area == (0.5 if model == "Blind" else pytest.approx(float(row["image_AUROC"])))
        assert not (results / "predictions" / row["job"] / "images").exists()
    capfd.readouterr()
    assert compare(here, "TinyModel", "Blind") == 0
    shown = capfd.readouterr().out
    area = np.mean([float(rows["TinyModel", "", seed]["image_AUROC"]) for seed in (0, 1)])
    (line,) = [line.split() for line in shown.splitlines() if line.startswith(" all")]
    assert [float(word) for word in line[1:4]] == pytest.approx([100 * area, 50, 100 * area - 50], abs=0.051)
    assert float(line[4]) < float(line[3]) < float(line[6])
    assert "10000 resamples" in " ".join(shown.split())
    assert "seeds (0, 1)" in " ".join(shown.split())
    assert str(results.relative_to(here)) in shown

    assert compare(here, "TinyModel", "Tiny") == 2
    assert "compare must be two of TinyModel, Blind; got Tiny" in capfd.readouterr().err
    config["models"].append({"class_path": "sweep_models.Scaled"})
    (here / "sweep.yaml").write_text(yaml.safe_dump(config))
    assert compare(here, "TinyModel", "Scaled", options=["--resume", results]) == 2
    message = capfd.readouterr().err
    assert "3 runs are missing, e.g. Scaled, MVTecLoco, seed 0" in message
    assert f"anomalib sweep --config {here}/sweep.yaml --resume {results}" in message
    (results / "predictions" / rows["Blind", "", 1]["job"] / "test_predictions.csv").unlink()
    assert compare(here, "TinyModel", "Blind") == 2
    assert "1 runs have no scores of images, e.g. Blind, MVTecLoco, seed 1" in capfd.readouterr().err


def test_categories(here: Path, tray) -> None:
    """Rows of the data, or the categories that one run has; other images are an error."""

    def rows(paths: str, category: str = "a") -> dict:
        fields = {"category": category, "raw_score": "1.5"}
        return {path: {**fields, "gt_label": str(int(path.isupper()))} for path in paths}

    folder = here / "kept"
    both = {name: comparison.Experiment({"class_path": name}, {}, {}, 0, "cpu", name, "Data", "") for name in "AB"}

    def images(first: dict, second: dict) -> dict:
        for experiment, content in zip(both.values(), (first, second), strict=True):
            path = comparison.kept_of(folder, experiment.key) / "test_predictions.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"image_path": name, **row} for name, row in content.items()]
            path.write_text("\n".join([",".join(lines[0]), *(",".join(line.values()) for line in lines)]))
        return comparison._images([both], folder)

    several = rows("xY") | rows("zW", "b")
    assert set(images(several, several)) == {("Data", "a"), ("Data", "b")}
    assert set(images(rows("xY"), rows("xY"))) == {("Data", "all")}
    with pytest.raises(ValueError, match="not tested on the same images of Data all"):
        images(rows("xY"), rows("xZ"))
    with pytest.raises(ValueError, match="Data all needs normal and anomalous images"):
        images(rows("XY"), rows("XY"))


def test_keep(here: Path, tray) -> None:
    """Pictures and checkpoints stay where they are asked for; the records name the pictures."""
    model = {"class_path": "tiny_model.TinyModel", "init_args": {"visualizer": True}}
    config = {"models": [model], "data": [tray], "trainer": {"max_epochs": 1}}
    status, results, rows = sweep(here, config, "--keep", "pictures,checkpoints")
    assert status == 0
    kept = results / "predictions" / rows["TinyModel", "", 0]["job"]
    assert list(kept.glob("weights/**/*.ckpt"))
    assert float(read_rows(kept / "test_predictions.csv")[0]["raw_score"]) > 20
    assert all((kept / row["picture"]).is_file() for row in read_rows(kept / "test_predictions.csv"))
    assert (kept / "test_metrics.json").is_file()
    assert list(rows) == [("TinyModel", "", 0)]
    status, plain, rows = sweep(here, config)
    assert sorted(path.name for path in (plain / "predictions").glob("*/*")) == [
        "test_defects.csv",
        "test_metrics.json",
        "test_predictions.csv",
    ]
