"""`anomalib report`: what it reads, what it refuses, and what lies in the file."""

import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from anomalib.cli.cli import AnomalibCLI
from PIL import Image
from recorded_run import MALICIOUS, picture, row, small_run, write_run

from anomalib_pack.report.interest import by_interest
from anomalib_pack.report.runs import read_runs
from anomalib_pack.report.tables import metric_table


class Page(HTMLParser):
    """What a browser makes of a file: elements, and the text in scripts, styles and the table."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.content = path.read_text(encoding="utf-8")
        self.feed(self.content)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.texts.setdefault(self.elements[-1][0], []).append(data)

    def json(self, name: str) -> list:
        return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', self.content)[1])


def report(*arguments: str | Path) -> None:
    AnomalibCLI(["report", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        report(*arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run")
    report(run)
    assert f"Report: {run / 'report.html'} (0.1 MB, images: 7, pictures: 1)" in capsys.readouterr().out
    page = Page(run / "report.html")
    ((data,), pictures) = page.json("data"), page.json("pictures")
    assert data["raw"] == [0.1, 0.2, 0.62, 0.9, 0.4, 0.15, 0.3]
    assert data["label"] == [0, 0, 0, 1, 1, 1, None]
    assert data["picture"] == [None, None, None, None, None, 0, None]
    with Image.open(BytesIO(b64decode(pictures[0][2]))) as image:
        assert (image.format, image.size) == ("WEBP", (256, 64))


def test_several_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (small_run(tmp_path / "results" / model / "tray" / "v0") for model in ("Ulsad", "Patchcore"))
    (second / "test_metrics.json").write_text(json.dumps({"image_AUROC": 0.75, "image_AUROC_dent": 0.1}))
    report(first, second, second.parent / "v0")  # the last one again, which counts once
    page = Page(tmp_path / "report.html")
    assert [run["name"] for run in page.json("data")] == ["Ulsad", "Patchcore"]
    assert len(page.json("pictures")) == 2  # each run has its own file
    runs = read_runs([first, second])
    metrics, blocks = metric_table(runs)
    assert metrics == ["image_AUROC", "pixel_AUPRO"]
    cells = {(block.group, line.run): line.cells for block in blocks for line in block.lines}
    assert [block.group for block in blocks] == ["all images", "dent", "scratch", "mean"]
    assert cells["all images", "Ulsad"] == [(0.5, False), (0.9, False)]  # the other one has none
    assert cells["all images", "Patchcore"] == [(0.75, True), (None, False)]
    assert cells["dent", "Patchcore"] == [(0.1, False), (None, False)]


def test_a_report_names_the_run_and_not_the_link_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run moves `latest`; the command of this report must not set a threshold of another model."""
    monkeypatch.chdir(tmp_path)
    checkpoint = small_run(Path("tray/v0")) / "weights" / "lightning" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    Path("tray/latest").symlink_to(tmp_path / "tray" / "v0")
    report("tray/latest")
    (data,) = Page(tmp_path / "tray" / "v0" / "report.html").json("data")
    assert (data["folder"], data["checkpoint"]) == ("tray/v0", str(checkpoint))
    Path("elsewhere").symlink_to(tmp_path / "tray" / "v0")
    assert read_runs([Path("elsewhere")])[0].folder == (tmp_path / "tray" / "v0").resolve()


def test_the_best_of_the_runs_on_the_same_images(tmp_path: Path) -> None:
    images = {"a": ["1.png"], "b": ["1.png"], "c": ["2.png"]}
    for value, (name, paths) in enumerate(images.items()):
        metrics = {"image_AUROC": 0.1 * value, "mean_loss": 0.1 * value}
        write_run(tmp_path / name, [row(path, 0.1, 0) for path in paths], metrics)
    ((block,), _) = metric_table(read_runs([tmp_path / name for name in images]))[::-1]
    assert [[best for _, best in line.cells] for line in block.lines] == [[False] * 2, [True, False], [False] * 2]


def test_nothing_from_files_becomes_markup(tmp_path: Path) -> None:
    """Whatever names files have, the page has the same elements."""
    bad = "</script><script>window.ran=1</script><!--<script>"
    run = write_run(
        tmp_path / "x" / f"run {bad.replace('/', '')}",
        [row(f"{bad}/{MALICIOUS}", 0.6, 0, category=bad, group=bad, explanation=bad)],
        {f"image_AUROC_{bad}": 0.5, MALICIOUS: 0.1},
    )
    other = write_run(tmp_path / "y", [row("a.png", 0.6, 0)], {"image_AUROC_good": 0.5, "b": 0.1})
    report(run, "--out", tmp_path / "bad.html")
    report(other, "--out", tmp_path / "good.html")
    pages = [Page(tmp_path / f"{name}.html") for name in ("bad", "good")]
    tags = [[tag for tag, _ in page.elements if tag != "wbr"] for page in pages]
    assert tags[0] == tags[1]
    assert pages[0].json("data")[0]["group"] == [bad]


def test_the_policy_allows_the_page_alone(tmp_path: Path) -> None:
    report(small_run(tmp_path))
    page = Page(tmp_path / "report.html")
    policy = next(values["content"] for _, values in page.elements if "http-equiv" in values)
    script = re.search(r"<script>(.*?)</script>", page.content, re.DOTALL)[1]
    style = re.search(r"<style>(.*?)</style>", page.content, re.DOTALL)[1]
    for name, text in (("script", script), ("style", style)):
        assert f"{name}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not [values for _, values in page.elements if {"src", "style"} & values.keys()]
    assert "http://" not in page.content.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.content


def test_the_size_is_bounded_by_what_matters_least(tmp_path: Path) -> None:
    """The worst mistake has a picture, four times as high; what is far from the threshold and right has none."""
    rows = []
    for index in range(40):
        name = f"images/{index}.png"
        picture(tmp_path / name, index, (512, 512) if index == 7 else (128, 128))
        rows.append(row(name, 0.3 - 0.001 * index if index != 7 else 0.95, 0, picture=name))
    write_run(tmp_path, rows)
    report(tmp_path, "--out", tmp_path / "all.html")
    whole = (tmp_path / "all.html").stat().st_size
    limit = whole * 2 // 3
    report(tmp_path, "--max_size", str(limit / 1e6), "--worst", "3")
    assert 0.9 * limit < (tmp_path / "report.html").stat().st_size <= limit
    page = Page(tmp_path / "report.html")
    places = page.json("data")[0]["picture"]
    shown = [index for index, place in enumerate(places) if place is not None]
    assert shown == list(range(len(shown)))
    assert 8 < len(shown) < 40
    assert places[7] == 0
    assert page.json("pictures")[0][:2] == [512, 512]
    assert page.json("pictures")[1][:2] == [128, 128]
    assert f"{40 - len(shown)} of 40 images have no thumbnail" in page.content


def test_number_and_height_of_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row(str(picture(tmp_path / f"{i}.png", i)), 0.1 * i, i % 2) for i in range(4)])
    report(run, "--thumbnails", "2", "--thumbnail_height", "16", "--worst", "0")
    page = Page(run / "report.html")
    assert [each[:2] for each in page.json("pictures")] == [[64, 16], [64, 16]]
    assert "2 of 4 images have no thumbnail" in page.content
    report(run, "--thumbnails", "0")
    assert Page(run / "report.html").json("pictures") == []


def test_pictures_that_viewers_do_not_show(tmp_path: Path) -> None:
    """A gray image of 16 bits spans black and white; one that is damaged is said."""
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
    run = write_run(tmp_path, [row(str(tmp_path / name), 0.1, 0) for name in ("deep.png", "damaged.png", "gone.png")])
    report(run)
    page = Page(run / "report.html")
    assert page.json("data")[0]["picture"] == [0, None, None]
    with Image.open(BytesIO(b64decode(page.json("pictures")[0][2]))) as image:
        assert image.convert("L").getextrema()[0] < 10
        assert image.convert("L").getextrema()[1] > 245
    assert f"1 pictures cannot be read, e.g. {tmp_path / 'damaged.png'}" in page.content


def test_worst_mistakes_come_first(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    (recorded,) = read_runs([run])
    assert [index for _, index in by_interest(recorded)] == [5, 2, 4, 6, 1, 0, 3]


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    """What it has written before counts."""
    run = small_run(tmp_path)
    (run / "test_metrics.json").unlink()
    records = run / "test_predictions.csv"
    records.write_text(records.read_text()[:-12])
    (read,) = read_runs([run])
    assert len(read.images) == 6
    report(run)
    assert "has no metrics" in Page(run / "report.html").content


def test_a_prediction_without_labels(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row("a.png", 0.9, None), row("b.png", float("nan"), None, pred_label="")])
    (run / "test_predictions.csv").rename(run / "predictions.csv")
    report(run)
    (data,) = Page(run / "report.html").json("data")
    assert (data["label"], data["raw"], data["predicted"]) == ([None, None], [0.9, None], [1, None])


def test_a_sweep(tmp_path: Path) -> None:
    """Jobs with records are runs; their metrics are in the results."""
    (tmp_path / "results.csv").write_text(
        "job,model,dataset,row,error,seed,model.init_args.alpha,job_duration,image_AUROC\n"
        "a1,Ulsad,MVTecLoco,tray,,0,0.5,3.5,0.75\nb2,Ulsad,MVTecLoco,tray,,1,0.5,3.5,0.5\nc3,Uniad,VisA,,failed,0,,,\n"
    )
    for job in ("a1", "b2"):
        write_run(tmp_path / "predictions" / job, [row("a.png", 0.9, 1)])
    runs = read_runs([tmp_path])
    assert [run.name for run in runs] == ["Ulsad, MVTecLoco tray, seed 0", "Ulsad, MVTecLoco tray, seed 1"]
    assert [run.metrics for run in runs] == [{"image_AUROC": 0.75}, {"image_AUROC": 0.5}]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    said = refusal(capsys, missing)
    assert f"There is no folder {missing}. Give the folder of a test run" in said
    assert "usage: anomalib report [" in said
    assert "run: anomalib report --help" in said
    run = small_run(tmp_path / "tray" / "v0")
    assert f"{run.parent} is no run: it has no test_predictions.csv. Do you mean {run}?" in refusal(capsys, run.parent)
    (tmp_path / "empty").mkdir()
    assert "--trainer.callbacks+=anomalib_pack.callbacks.WriteRecords" in refusal(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "results.csv").write_text("job,model,dataset,row,error,seed\n")
    assert f"The sweep {tmp_path / 'empty'} has no predictions/" in refusal(capsys, tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.15,0.15", "0.15,much"), "has 'much' in place of a number."),
        (("good,0,0,0.1,", "good,2,0,0.1,"), "has the label '2'; 0, 1 or none is allowed."),
        (("raw_score", "score"), "is no file of records: it has no column raw_score."),
        (("0.9,0.9,0.5", "0.9,0.9,0.6"), "has 2 different thresholds; a run has one."),
        (("good/1.png,screw,good,0,0,0.2,0.2,0.5,0.5,,", "good/1.png"), "is damaged: line 3 has too few columns."),
    ],
)
def test_damaged_records(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    records = small_run(tmp_path) / "test_predictions.csv"
    text = records.read_text()
    assert change[0] in text
    records.write_text(text.replace(*change, 1))
    with pytest.raises(ValueError, match=re.escape(f"{records} {message}")):
        read_runs([tmp_path])


def test_records_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images"):
        read_runs([write_run(tmp_path, [])])


def test_damaged_metrics(tmp_path: Path) -> None:
    (small_run(tmp_path) / "test_metrics.json").write_text('{"image_AUROC": []}')
    with pytest.raises(ValueError, match=r"test_metrics\.json must have a number for each metric"):
        read_runs([tmp_path])
