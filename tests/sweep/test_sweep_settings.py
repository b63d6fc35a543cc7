"""What a configuration may say, and what is said when it does not."""

from pathlib import Path

import pytest
import yaml
from sweep_runs import ADJUSTABLE, TINY, adjustable

from anomalib_pack.sweep.components import build_component, build_trainer_arguments, find_class
from anomalib_pack.sweep.grid import expand
from anomalib_pack.sweep.settings import read_plan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "benchmark").glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration(path: Path) -> None:
    """Every class of every job is there and takes its arguments."""
    plan = read_plan(yaml.safe_load(path.read_text()))
    titles = [experiment.title for experiment in plan.experiments]
    assert len(titles) > 1
    assert len(set(titles)) == len(titles)


def test_all_is_as_large_as_it_says() -> None:
    """And MiniMaxAd, which sees one category in each job, runs the variant for that."""
    text = (CONFIGS / "benchmark" / "all.yaml").read_text()
    experiments = read_plan(yaml.safe_load(text)).experiments
    models = {experiment.model_name for experiment in experiments}
    categories = {(experiment.dataset, experiment.row) for experiment in experiments}
    seeds = {experiment.seed for experiment in experiments}
    claim = f": {len(models)} models, {len(categories)} categories, {len(seeds)} seeds."
    assert claim in " ".join(text.replace("\n#", " ").split())
    assert len(experiments) == len(models) * len(categories) * len(seeds)
    ours = [experiment for experiment in experiments if experiment.model["class_path"] == "MiniMaxAd"]
    assert len(ours) == len(categories) * len(seeds)
    assert all(experiment.model["init_args"]["variant"] == "fp" for experiment in ours)


def test_jobs_are_a_product(tray) -> None:
    config = {
        "models": [TINY, adjustable("Sizes", {"max_epochs": {"grid": [1, 2]}}, grid_size={"grid": [1, 2, 3]})],
        "data": [tray, tray | {"class_path": "SyntheticLoco"}],
        "seeds": [3, 4],
        "trainer": {"max_epochs": 5, "gradient_clip_val": 1},
    }
    experiments = read_plan(config).experiments
    assert len(experiments) == (1 + 2 * 3) * 2 * 2
    assert len({experiment.key for experiment in experiments}) == len(experiments)
    first, last = experiments[0], experiments[-1]
    assert first.title == "TinyModel, MVTecLoco, seed 3"
    assert first.trainer == {"max_epochs": 5, "gradient_clip_val": 1}
    assert last.title == "Sizes grid_size=3, max_epochs=2, SyntheticLoco, seed 4"
    assert last.trainer == {"max_epochs": 2, "gradient_clip_val": 1}
    assert [experiment.seed for experiment in experiments[:14]] == [3] * 14  # whole tables after each seed


@pytest.mark.parametrize(
    ("class_path", "init_args", "expected"),
    [
        ("RealIAD", {"category": {"grid": ["audiojack", "zipper"]}}, ["audiojack", "zipper"]),
        (
            "MultiCategory",
            {"dataset": "RealIAD", "categories": {"grid": [["audiojack"], ["mint", "zipper"], "all"]}},
            ["audiojack", "mint, zipper", "all"],
        ),
        (
            "RealIAD",
            {"category": "mint", "resolution": {"grid": [256, 512]}},
            ["resolution=256", "resolution=512"],
        ),
    ],
)
def test_rows_are_named_by_categories(class_path: str, init_args: dict, expected: list[str]) -> None:
    """If these alone tell the data apart."""
    data = {"class_path": class_path, "init_args": init_args}
    experiments = read_plan({"models": [TINY], "data": [data]}).experiments
    assert [experiment.row for experiment in experiments] == expected


def test_key_is_of_the_configuration(tray) -> None:
    def key(model, data=tray, **others):
        return read_plan({"models": [model], "data": [data], **others}).experiments[0].key

    base = key(TINY)
    assert key(TINY | {"name": "Other"}, tray | {"name": "Other"}) == base
    others = {
        key(TINY, seeds=[1]),
        key(TINY, trainer={"max_epochs": 3}),
        key(TINY | {"data_args": {"train_batch_size": 1}}),
        key(adjustable()),
    }
    assert len(others | {base}) == 5


def test_benchmark_shape(tray) -> None:
    grid = {"class_path": ADJUSTABLE, "init_args": {"grid_size": {"grid": [1, 2]}}}
    benchmark = {"seed": {"grid": [0, 1]}, "model": {"grid": [TINY, grid]}, "data": tray}
    plan = read_plan({"accelerator": ["cpu"], "benchmark": benchmark})
    assert len(plan.experiments) == 6
    assert {experiment.model_name for experiment in plan.experiments} == {
        "TinyModel",
        "Adjustable grid_size=1",
        "Adjustable grid_size=2",
    }


def test_accelerators_are_told_apart(tray) -> None:
    plan = read_plan({"accelerator": ["cpu", "cuda"], "models": [TINY], "data": [tray]})
    assert [experiment.model_name for experiment in plan.experiments] == ["TinyModel cpu", "TinyModel cuda"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": []}, "the configuration has the unknown key model; allowed are models, data"),
        ({"models": None}, "models must be a list with at least one entry, got None"),
        ({"data": []}, r"data must be a list with at least one entry, got \[\]"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [-1]}, "seeds must be whole numbers in"),
        ({"seeds": ["a"]}, "seeds must be whole numbers in"),
        ({"metrics": [1]}, "metrics must be names"),
        ({"accelerator": "tpu"}, "accelerator must be cpu or cuda"),
        ({"accelerator": []}, "accelerator must be cpu or cuda"),
        ({"trainer": [1]}, "trainer must be a mapping"),
        (
            {"trainer": {"max_epoch": 1}},
            "trainer of .*TinyModel has the unknown key max_epoch; allowed.*max_epochs",
        ),
        ({"trainer": {"devices": 2}}, "unknown key devices"),
        ({"trainer": {"max_epochs": "many"}}, "trainer of model TinyModel.*max_epochs"),
        ({"models": ["Padim"]}, r"models\[0\] must be a mapping"),
        ({"models": [{"init_args": {}}]}, r"models\[0\] needs a class_path"),
        ({"models": [TINY | {"args": 1}]}, r"models\[0\] has the unknown key args; allowed are class_path"),
        ({"models": [TINY | {"init_args": 1}]}, r"models\[0\].init_args must be a mapping"),
        ({"models": [TINY | {"init_args": {"grid": [1]}}]}, r"models\[0\].init_args must be a mapping"),
        ({"models": [TINY | {"trainer": 1}]}, r"models\[0\].trainer must be a mapping"),
        ({"models": [{"class_path": "NoModel"}]}, "class_path must be .* one of .*Patchcore.*Uniad.*got 'NoModel'"),
        ({"models": [{"class_path": "nowhere.Model"}]}, "'nowhere.Model' cannot be imported: No module named"),
        ({"models": [{"class_path": "pathlib.Path"}]}, "subclass of AnomalibModule"),
        ({"models": [{"class_path": "MVTecLoco"}]}, "subclass of AnomalibModule"),
        ({"models": [{"class_path": {"grid": [1]}}]}, "subclass of AnomalibModule"),
        (
            {"models": [{"class_path": "Padim", "init_args": {"n_feature": 1}}]},
            "model Padim.init_args has the unknown key n_feature; allowed are backbone",
        ),
        (
            {"models": [{"class_path": "Padim", "init_args": {"n_features": "few"}}]},
            r"Padim\.init_args: .*n_features",
        ),
        ({"models": [adjustable(grid_size={"grid": []})]}, r"models\[0\].init_args.grid_size.grid must be a list"),
        ({"models": [TINY, TINY]}, "is the same job as"),
        ({"models": [TINY | {"data_args": {"size": 1}}]}, "data MVTecLoco.* of model TinyModel.* unknown key size"),
        ({"data": [{"class_path": "NoData"}]}, "class_path must be .* one of .*MVTecAD.*SyntheticLoco.*got 'NoData'"),
        ({"benchmark": {}}, "benchmark stands in place of models, data"),
    ],
)
def test_wrong_values(tray, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan({"models": [TINY], "data": [tray]} | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "the configuration must be a mapping"),
        ({"benchmark": {"seed": 0, "model": TINY}}, "benchmark lacks the key data"),
        ({"benchmark": {"seed": 0, "model": TINY, "data": {}, "trainer": {}}}, "benchmark has the unknown key trainer"),
    ],
)
def test_wrong_configuration(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan(config)


def test_grids() -> None:
    assert expand({"grid_size": 3, "grid": 2}, "x") == [{"grid_size": 3, "grid": 2}]  # no grid: not alone
    nested = {"a": {"grid": [{"b": {"grid": [1, 2]}}, 3]}}
    assert expand(nested, "x") == [{"a": {"b": 1}}, {"a": {"b": 2}}, {"a": 3}]
    with pytest.raises(ValueError, match=r"x\.a\.grid must be a list"):
        expand({"a": {"grid": 5}}, "x")


def test_components(tray) -> None:
    """Built as `anomalib train` does, with objects among the arguments."""
    from anomalib.data import Kolektor
    from sweep_models import Kolektor as Namesake

    from anomalib_pack.metrics import GroupEvaluator

    assert isinstance(build_component("model", TINY).evaluator, GroupEvaluator)
    assert find_class("data", "Kolektor", "data") is Kolektor
    assert type(build_component("data", tray | {"class_path": "sweep_models.Kolektor"})) is Namesake
    callbacks = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "train_loss"}}]
    arguments = build_trainer_arguments({"max_epochs": 3, "callbacks": callbacks})
    assert set(arguments) == {"max_epochs", "callbacks"}
    assert arguments["callbacks"][0].monitor == "train_loss"
