"""The files of the papers, without their data sets, weights and GPUs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from published_trees import write_trees

from anomalib_pack.sweep.components import build_component
from anomalib_pack.sweep.experiment import run_experiment
from anomalib_pack.sweep.papers.command import read_plan
from anomalib_pack.sweep.papers.files import CONFIGS, table_files
from anomalib_pack.sweep.papers.settings import read_tables
from anomalib_pack.sweep.papers.store import runs_of
from anomalib_pack.sweep.rehearsal import rehearse
from anomalib_pack.sweep.settings import Experiment, fingerprint

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "papers.md"
PAPERS = ["ulsad", "unislad", "minimaxad", "uniad", "efficientad"]
LINE = re.compile(r"\| [^|]+ \| `papers/(\w+/\w+)` \| (\d+) \|")

# Run files of recipes that the papers do not have, or that test a half of a training.
NOT_OF_A_PAPER = {"visa_unified.yaml": "uniad", "aebad_mvtec_ad_test_aebad.yaml": "minimaxad"} | {
    "aebad_mvtec_ad_test_mvtec_ad.yaml": "minimaxad"
}


@pytest.fixture(scope="module")
def tables():
    return read_tables(table_files(CONFIGS / "papers"), "cpu")


@pytest.fixture(scope="module")
def runs(tables) -> list[Experiment]:
    return runs_of(tables, tables)


def test_papers() -> None:
    assert sorted(path.name for path in (CONFIGS / "papers").iterdir()) == sorted(PAPERS)


def test_index_lists_all_tables(tables) -> None:
    """With the number of their jobs; a table that reads no trainings has none."""
    listed = [(name, int(jobs)) for name, jobs in LINE.findall(INDEX.read_text())]
    expected = {table.name: len(runs_of([table], [table])) for table in tables}
    assert dict(listed) == expected
    assert len(listed) == len(expected)


def test_every_published_table_has_numbers(tables) -> None:
    for table in tables:
        published = [cell.published for cell in table.cells.values() if cell.published]
        assert published, table.name
        if not table.efficiency:
            assert all(0 <= number.mean <= 100 for number in published), table.name
        assert all(number.deviation is None or number.deviation < 10 for number in published), table.name


def run_files() -> list[Path]:
    files = [path for paper in PAPERS for path in sorted((CONFIGS / paper).rglob("*.yaml"))]
    return [path for path in files if NOT_OF_A_PAPER.get(path.name) != path.parent.name]


@pytest.mark.parametrize("path", run_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_run_files_are_runs_of_the_tables(path: Path, runs) -> None:
    """`anomalib train --config` with one of them is one of the trainings that the paper's tables read."""
    config = yaml.safe_load(path.read_text())
    trainer = config.get("trainer", {})
    (seeding,) = trainer.pop("callbacks", [{"init_args": {"seed": 0}}])
    model = {"class_path": config["model"]["class_path"], "init_args": config["model"].get("init_args", {})}
    for argument in ("evaluator", "visualizer"):  # of the output alone
        model["init_args"].pop(argument, None)
    data = {"class_path": config["data"]["class_path"], "init_args": config["data"]["init_args"]}
    alone = Experiment(model, data, trainer, seeding["init_args"]["seed"], "cpu", "", "", "", measures={})
    assert alone.key in {run.key for run in runs}


@pytest.mark.slow
def test_all_can_be_built(capsys) -> None:
    """Every class, argument and category of every file; every model of the pack is built."""
    plan = read_plan(CONFIGS / "papers")
    rehearse(plan.experiments)
    shown = " ".join(capsys.readouterr().out.split())
    not_built = set(re.findall(r"class and arguments alone: (\w+)", shown))
    assert not_built <= {"Cflow", "Fastflow", "Draem", "Dsr", "EfficientAd"}


@pytest.mark.slow
def test_data_sets_are_read_as_published(runs, tmp_path: Path, monkeypatch) -> None:
    """Every datamodule finds training, validation and test images of its category in a tree of the published layout."""
    monkeypatch.chdir(tmp_path)
    write_trees(tmp_path, monkeypatch)
    given = [
        part for run in runs for part in (run.data, *(test["data"] for test in run.tests.values() if "data" in test))
    ]
    for data in {fingerprint(each): each for each in given}.values():
        datamodule = build_component("data", data)
        datamodule.prepare_data()
        datamodule.setup()
        assert min(len(datamodule.train_data), len(datamodule.val_data), len(datamodule.test_data)) > 0, data
        assert datamodule.val_data.has_normal, data


def without_weights(run: Experiment, folder: Path) -> Experiment:
    """A run for an epoch and a few steps, with random networks."""
    arguments = dict(run.model["init_args"]) | {"weights": None}
    if run.model["class_path"] == "Unislad":
        arguments |= {"vit_weights": None, "shrinkage": 0.1}
    if run.model["class_path"] == "DistilledEfficientAd":
        from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork

        torch.save(SmallPatchDescriptionNetwork(384, padding=True).state_dict(), folder / "teacher.pth")
        del arguments["weights"]
        arguments |= {"teacher_weights": "teacher.pth", "penalty_images": "datasets/MPDD/tubes/train/good"}
    model = run.model | {"init_args": arguments}
    small = {"train_batch_size": min(4, run.data["init_args"].get("train_batch_size", 4)), "num_workers": 0}
    data = run.data | {"init_args": run.data["init_args"] | small}
    tests = {
        name: test
        | (
            {"data": test["data"] | {"init_args": test["data"]["init_args"] | {"num_workers": 0}}}
            if "data" in test
            else {}
        )
        for name, test in run.tests.items()
    }
    trainer = {} if run.model["class_path"] == "Unislad" else {"max_epochs": 1, "max_steps": 2}
    return replace(run, model=model, data=data, tests=tests, trainer=trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("paper", "model", "data", "row"),
    [
        ("ulsad", "ULSAD", "MVTec-LOCO", "pushpins"),
        ("unislad", "UniSLAD", "MVTecLoco", "juice_bottle"),
        ("minimaxad", "MiniMaxAD-fr", "AeBAD-S&MVTecAD", ""),
        ("uniad", "Ours", "unified", ""),
        ("efficientad", "EfficientAD-S", "LOCO", "pushpins"),
    ],
)
def test_a_whole_run(paper: str, model: str, data: str, row: str, tmp_path: Path, monkeypatch) -> None:
    """Whatever a table reads of a run is there after it: all metrics, groups and tests."""
    monkeypatch.chdir(tmp_path)
    write_trees(tmp_path, monkeypatch)
    tables = read_tables(table_files(CONFIGS / "papers" / paper), "cpu")
    cells = [cell for table in tables for cell in table.cells.values()]
    place = (model, data, row)
    named = {(each.model_name, each.dataset, each.row): each.key for cell in cells for each in cell.experiments}
    run = next(run for run in runs_of(tables, tables) if run.key == named[place])
    metrics = run_experiment(without_weights(run, tmp_path), tmp_path / "kept")
    columns = {cell.column_of(each) for cell in cells for each in cell.experiments if each.key == run.key}
    assert columns
    assert columns <= metrics.keys()
    assert all(0 <= metrics[column] <= 1 for column in columns)
