"""What a table may say, and the numbers in its cells."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from anomalib_pack.sweep.papers.cells import difference, is_significant, measured
from anomalib_pack.sweep.papers.files import CONFIGS, locate, table_files
from anomalib_pack.sweep.papers.settings import Number, read_tables
from anomalib_pack.sweep.papers.store import runs_of
from anomalib_pack.sweep.settings import check_experiments

DATA = [
    {"name": "A", "class_path": "MVTecAD", "init_args": {"category": {"grid": ["bottle", "cable"]}}},
    {"name": "B", "class_path": "MVTecLoco", "group": "mean", "init_args": {"category": {"grid": ["pushpins", "x"]}}},
]
RUNS = {
    "seeds": [0, 1],
    "data": DATA,
    "models": [
        {"name": "Ours", "class_path": "Padim", "by_data": {"B": {"init_args": {"n_features": 7}}}},
        {"name": "Old", "class_path": "Patchcore", "seeds": [0]},
    ],
}
TABLE = {
    **RUNS,
    "title": "T",
    "select": {"metric": "image_AUROC"},
    "rows": [{"model": ["Ours", "Old"]}],
    "columns": [{"name": "all"}, {"data": "A"}, {"data": ["B"], "group": ["logical_anomalies"]}],
    "published": {"Ours": ["83.1 ± 0.4", 70, "-"], "Old": [None, "60", 1]},
}
X = {"rows": [{"model": ["x"]}], "columns": [{"data": "A"}]}


def table(folder: Path, **changes):
    path = folder / "paper" / "table_1.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**TABLE, **changes}))
    return read_tables([path], "cpu")[0]


def results(cell, values: dict) -> dict:
    """Rows of a store, with values by data set, row and seed."""
    return {
        each.key: {cell.column_of(each): str(values[each.dataset, each.row, each.seed]), "error": ""}
        for each in cell.experiments
        if (each.dataset, each.row, each.seed) in values
    }


def test_lines_and_published(tmp_path: Path) -> None:
    read = table(tmp_path)
    assert read.name == "paper/table_1"
    assert read.rows == ["Ours", "Old"]
    assert read.columns == ["all", "A", "B, logical_anomalies"]
    assert read.cells["Ours", "all"].published == Number(83.1, 0.4)
    assert read.cells["Ours", "A"].published == Number(70)
    assert read.cells["Ours", "B, logical_anomalies"].experiments == []  # the paper has nothing: nothing to run
    unknown = read.cells["Old", "all"]
    assert unknown.published is None
    assert len(unknown.experiments) == 4  # of one seed
    assert len(read.cells["Ours", "A"].experiments) == 4  # two categories, two seeds


def test_columns_of_results(tmp_path: Path) -> None:
    """Groups come from the table, else from the data; other metrics may stand for one on some data."""
    data = [DATA[0], {**DATA[1], "instead": {"pixel_AUPRO": "pixel_SPRO"}}]
    whole = {"name": "C", "class_path": "MultiCategory", "group": "mean", "init_args": {"dataset": "MVTecAD"}}
    tests = {"T": {"init_args": {"n_features": 3}, "group": "x"}}
    models = [{**RUNS["models"][0], "tests": tests}]
    columns = [
        {"name": "all"},
        {"name": "one", "category": "bottle"},
        {"name": "tested", "test": "T"},
        {"name": "mAD", "data": "C", "metric": "mAD"},
    ]
    read = table(
        tmp_path,
        data=[*data, whole],
        models=models,
        select={"metric": "pixel_AUPRO"},
        rows=[{"model": ["Ours"]}],
        columns=columns,
        published={},
    )

    def found(column: str) -> set[str]:
        cell = read.cells["Ours", column]
        return {f"{each.dataset} {each.row} {cell.column_of(each)}" for each in cell.experiments}

    assert found("all") == {
        *("A bottle pixel_AUPRO", "A cable pixel_AUPRO"),
        *("B pushpins pixel_SPRO_mean", "B x pixel_SPRO_mean"),
        "C  pixel_AUPRO_mean",
    }
    assert found("one") == {"A bottle pixel_AUPRO", "C  pixel_AUPRO_bottle"}
    assert "A cable T/pixel_AUPRO_x" in found("tested")
    assert found("mAD") == {"C  mAD_mean"}


def test_means(tmp_path: Path) -> None:
    """By hand. Mean over categories, then over data sets, for each seed; a seed that lacks one counts for nothing."""
    cell = table(tmp_path).cells["Ours", "all"]
    first = {("A", "bottle", 0): 0.9, ("A", "cable", 0): 0.7, ("B", "pushpins", 0): 0.5, ("B", "x", 0): 0.7}
    second = {("A", "bottle", 1): 1.0, ("A", "cable", 1): 0.6, ("B", "pushpins", 1): 0.7, ("B", "x", 1): 0.7}
    one = measured(cell, results(cell, first))
    assert (one.mean, one.deviation, one.seeds, one.expected) == (pytest.approx(70), None, 1, 2)
    both = measured(cell, results(cell, first | second))
    assert both.mean == pytest.approx(72.5)  # 70 and 75
    assert both.deviation == pytest.approx(12.5**0.5)
    del second["B", "x", 1]
    assert measured(cell, results(cell, first | second)).mean == pytest.approx(70)
    assert measured(cell, {}) is None
    failed = {key: row | {"error": "boom"} for key, row in results(cell, first).items()}
    assert measured(cell, failed) is None
    assert difference(cell, both) == pytest.approx(72.5 - 83.1)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ("69.0 ± 1.0", True),  # 3.5 is more than 2 sqrt(1/2 + 1/2)
        ("69.0 ± 2.5", False),  # 3.5 is less than 2 sqrt(6.25/2 + 1/2)
        ("74.4 ± 1.0", False),  # 1.9 below
        ("74.6 ± 1.0", True),  # 2.1 below
        ("0", None),
    ],
)
def test_significance(tmp_path: Path, published: str, expected) -> None:
    """By hand: 72.5 with a deviation of 1 over two seeds."""
    read = table(tmp_path, published={"Ours": ["-", published, "-"]})
    cell = read.cells["Ours", "A"]
    low, high = 0.725 - 0.01 / 2**0.5, 0.725 + 0.01 / 2**0.5
    values = {("A", name, seed): value for name in ("bottle", "cable") for seed, value in enumerate((low, high))}
    found = measured(cell, results(cell, values))
    assert found.deviation == pytest.approx(1)
    assert is_significant(cell, found) is expected


def test_same_training_is_one_run(tmp_path: Path) -> None:
    """Names, tests, device and arguments that are defaults do not make another training, settings do."""
    read = table(
        tmp_path,
        data=DATA[:1],
        seeds=[0],
        models=[
            {"name": "a", "class_path": "Ulsad"},
            {"name": "b", "class_path": "Ulsad", "init_args": {"alpha": 0.9, "layers": ["layer2", "layer3"]}},
            {"name": "c", "class_path": "Ulsad", "init_args": {"alpha": 0.8}},
            {"name": "d", "class_path": "Ulsad", "tests": {"T": {"init_args": {"alpha": 0.5}}}},
        ],
        rows=[{"model": ["a", "b", "c", "d"]}, {"name": "tested", "model": "d", "test": "T"}],
        columns=[{"data": "A"}],
        published={},
    )
    runs = runs_of([read], [read])
    assert len(runs) == 2 * 2
    assert {tuple(run.measures) for run in runs} == {("", "T"), ("",)}
    check_experiments(runs)

    # A table that names another file, without the test, measures it all the same.
    other = table(tmp_path, data=DATA[:1], seeds=[0], models=[{"name": "x", "class_path": "Ulsad"}], published={}, **X)
    (run, _) = runs_of([other], [other, read])
    assert set(run.measures) == {"", "T"} == {"", *run.tests}
    assert set(run.asked) == {"", "T"}
    assert len({replace(run, accelerator="cuda").key for run in runs} | {run.key for run in runs}) == 4


def test_settings_of_a_category_go_before_those_of_the_data(tmp_path: Path) -> None:
    by_data = {
        "A": {"init_args": {"n_features": 1}, "trainer": {"max_epochs": 4}},
        "cable": {"init_args": {"n_features": 2}},
    }
    model = {"name": "Ours", "class_path": "Padim", "trainer": {"max_epochs": 3}, "by_data": by_data}
    read = table(tmp_path, models=[model], rows=[{"model": ["Ours"]}], published={})
    found = {
        each.row: (each.model["init_args"].get("n_features"), each.trainer["max_epochs"])
        for each in read.cells["Ours", "all"].experiments
    }
    assert found == {"bottle": (1, 4), "cable": (2, 4), "pushpins": (None, 3), "x": (None, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, "the table has the unknown key titel; allowed are title"),
        ({"title": ""}, "a table needs title"),
        ({"rows": {"a": 1}}, "rows must be a list of mappings"),
        ({"rows": [{"models": "Ours"}]}, r"rows\[0\] has the unknown key models; allowed are name, model"),
        ({"rows": [{"model": ["Ours", "Ours"]}]}, "must have a name of its own, got 'Ours'"),
        ({"rows": [{}]}, "must have a name of its own"),
        ({"rows": [{"model": ["Theirs"]}], "published": {}}, "Theirs, all must have as model one of Old, Ours, got"),
        ({"columns": [{"data": "C"}], "published": {}}, "must have as data one of A, B, got 'C'"),
        ({"columns": [{"category": "hazelnut"}], "published": {}}, "as category one of bottle, cable, pushpins"),
        ({"columns": [{"name": "x", "test": "T"}], "published": {}}, "as test one of "),
        ({"columns": [{"name": "x", "metric": "AUROC"}]}, r"columns\[0\].metric must be one of image_AUROC"),
        ({"columns": [{"name": "x", "metric": "pixel_SPRO_0.05"}]}, "must be pixel_SPRO, which has this limit"),
        ({"select": {}}, "the cell Ours, all needs a metric"),
        ({"rows": [{"name": "x"}], "published": {}}, "the cell x, all must be of one model, got Ours, Old"),
        ({"rows": [{"name": "Ours", "measure": "flops"}], "select": {}, "published": {}}, "of the section efficiency"),
        ({"published": {"Hers": [1, 2, 3]}}, "published has the unknown key Hers; allowed are Ours, Old"),
        ({"published": {"Ours": [1]}}, "published.Ours must be a list with a number for each of all, A, B"),
        ({"published": {"Ours": ["1 +- 2", 1, 1]}}, "published.Ours must hold numbers, '83.1 ± 0.4'"),
        ({"map_size": "large"}, "map_size must be one of input, original"),
        ({"models": [{"name": "Ours", "class_path": "Padim", "init_args": {"evaluator": True}}]}, "no evaluator"),
        ({"models": [{**RUNS["models"][0], "by_data": {"D": {}}}]}, "by_data of model Ours has the unknown key D"),
        ({"models": [{**RUNS["models"][0], "by_data": {"A": {"lr": 1}}}]}, r"by_data.A has the unknown key lr"),
        ({"models": [{**RUNS["models"][0], "tests": {"T": 1}}]}, r"models\[0\].tests.T must be a mapping"),
        (
            {"data": [{**DATA[0], "instead": {"pixel_AUPRO": "x"}}, DATA[1]]},
            "instead.pixel_AUPRO of data A must be one of",
        ),
        ({"columns": [{"name": "x", "data": "B", "category": "bottle"}], "published": {"Ours": [1]}}, "selects no run"),
    ],
)
def test_wrong_values(tmp_path: Path, change, message) -> None:
    with pytest.raises(ValueError, match=f"table_1.yaml: .*{message}"):
        table(tmp_path, **change)


def test_files(tmp_path: Path, monkeypatch) -> None:
    """A name without suffix is a file here, or one of the pack's; tables come in the order of their numbers."""
    monkeypatch.chdir(tmp_path)
    assert locate("papers/ulsad/table_22") == CONFIGS / "papers" / "ulsad" / "table_22.yaml"
    assert locate("papers/ulsad") == CONFIGS / "papers" / "ulsad"
    with pytest.raises(FileNotFoundError, match="config must be a file or a folder, got papers/ulsad/table_0"):
        locate("papers/ulsad/table_0")
    names = ["table_10", "table_2", "figure_7", "table_a7", "runs/main"]
    for name in names:
        path = tmp_path / "papers" / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert locate("papers/mine/table_2") == Path("papers/mine/table_2.yaml")
    assert [path.stem for path in table_files(Path("papers"))] == ["figure_7", "table_2", "table_10", "table_a7"]
    with pytest.raises(ValueError, match="a folder with tables"):
        table_files(tmp_path / "papers" / "mine" / "runs")
