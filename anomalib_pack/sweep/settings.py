"""What a configuration of `anomalib sweep` may say, and the experiments that it stands for."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

from anomalib_pack.checks import check_keys, require
from anomalib_pack.sweep.components import check_component, check_trainer, without_defaults
from anomalib_pack.sweep.grid import differences, expand

KEYS = ["models", "data", "seeds", "trainer", "accelerator", "metrics", "benchmark"]
MODEL_KEYS = ["class_path", "init_args", "trainer", "data_args", "name", "seeds", "by_data", "tests", "resources"]
DATA_KEYS = ["class_path", "init_args", "name", "group", "instead", "tests"]
BY_DATA_KEYS = ["init_args", "trainer", "data_args"]  # of a model's settings for one data set or category
TEST_KEYS = ["init_args", "data", "group"]
BENCHMARK_KEYS = ["model", "data", "seed"]  # of a configuration of `anomalib benchmark`
RESOURCE_KEYS = ["num_cpus", "num_gpus", "memory"]  # of a task of Ray
ACCELERATORS = ["cpu", "cuda"]  # as in `anomalib benchmark`
CATEGORY, CATEGORIES = "init_args.category", "init_args.categories"
METRICS = ["image_AUROC", "pixel_AUROC", "pixel_AUPRO"]
SEED_LIMIT = 2**32

Config = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One job: a model, data, a seed, and where it runs.

    Attributes:
        model: `class_path` and `init_args`.
        data: `class_path` and `init_args`.
        trainer: Arguments of the ``Trainer``.
        seed: Of everything random.
        accelerator: ``"cpu"`` or ``"cuda"``.
        model_name: Column in the tables.
        dataset: The table, one per data set.
        row: Row in the table, e.g. the category; empty if the data set has one experiment per model and seed.
        tests: Further tests of the trained model by name: each with `init_args` of the model that differ and perhaps
            other `data`.
        group: Group whose values count in tables of papers; empty for those of all images.
        instead: Metrics that stand for others in tables of papers, e.g. AUC-sPRO for AUPRO.
        map_size: At what size maps are compared with masks where metrics are asked for, as ``GroupEvaluator`` has it.
        measures: Metrics of each test by its name, which is empty for the first. None: what the model's evaluator has.
        resources: What it asks of Ray: `num_cpus`, `num_gpus`, and bytes of `memory`.
        keep: What stays beside the tables, of ``keeping.KINDS``.
    """

    model: Config
    data: Config
    trainer: Config
    seed: int
    accelerator: str
    model_name: str
    dataset: str
    row: str
    tests: Config = field(default_factory=dict)
    group: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    map_size: str = "input"
    measures: dict[str, list[str]] | None = None
    resources: dict[str, float] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        """All that the results depend on; the names in the tables do not count."""
        names = ("accelerator", "seed", "model", "data", "trainer")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def key(self) -> str:
        """Hash of the configuration, by which a resumed sweep recognises what it has done.

        Where metrics are asked for, it is that of the training: device and tests do not count, and arguments that are
        the defaults of their class are as good as none.
        """
        if self.measures is None:
            return fingerprint(self.config | ({"tests": self.tests} if self.tests else {}))
        parts = {section: without_defaults(section, getattr(self, section)) for section in ("model", "data")}
        return fingerprint({**parts, "trainer": self.trainer, "seed": self.seed})

    @property
    def asked(self) -> dict[str, Config]:
        """What is measured: metrics and a hash of what is tested, for each test by its name."""
        return {
            name: {
                "metrics": sorted(metrics),
                "recipe": fingerprint({**self.tests.get(name, {}), "map_size": self.map_size}),
            }
            for name, metrics in (self.measures or {}).items()
        }

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"{self.model_name}, {self.dataset}{f' {self.row}' if self.row else ''}, seed {self.seed}"


def fingerprint(config: Config) -> str:
    """Hash of a configuration."""
    text = json.dumps(config, sort_keys=True, default=str)  # YAML has dates, JSON has none
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """All experiments in the order in which they run, and the metrics in the tables."""

    experiments: list[Experiment]
    accelerators: list[str]
    metrics: list[str]


def read_plan(config: Any) -> Plan:
    """Read a configuration file's content.

    Experiments are the product over accelerators, seeds, data and models, the last of these changing first: after a
    seed, all tables are complete.

    Raises:
        ValueError: If anything is unknown, empty, or of a wrong type: the message names the key and what is allowed.
    """
    _check_mapping(config, "the configuration")
    check_keys(config, KEYS, "the configuration")
    config = _without_benchmark(config) if "benchmark" in config else config
    accelerators, metrics = _accelerators(config), _metrics(config)
    experiments = read_experiments(config, accelerators)
    check_experiments(experiments)
    return Plan(experiments, accelerators, metrics)


def read_experiments(config: Config, accelerators: list[str]) -> list[Experiment]:
    """List the experiments of a configuration with `models`, `data`, `seeds` and `trainer`.

    Raises:
        ValueError: If anything is unknown, empty, or of a wrong type, classes and their arguments apart.
    """
    models = _models(_list(config.get("models"), "models"), config.get("trainer") or {})
    data = _data(_list(config.get("data"), "data"))
    _check_by_data(models, data)
    for model in models:
        model["seeds"] = _seeds(model if "seeds" in model else config)
    seeds = dict.fromkeys(seed for each in [{"seeds": _seeds(config)}, *models] for seed in each["seeds"])
    return [
        _experiment(accelerator, seed, of_data, model, several=len(accelerators) > 1)
        for accelerator, seed, of_data, model in product(accelerators, seeds, data, models)
        if seed in model["seeds"]
    ]


def _experiment(accelerator: str, seed: int, data: Config, model: Config, *, several: bool) -> Experiment:
    changes = [model["by_data"].get(name, {}) for name in (data["name"], data["label"])]  # of the category go before

    def merged(key: str, given: Config) -> Config:
        return {**given, **{name: value for change in changes for name, value in change.get(key, {}).items()}}

    data_args = merged("data_args", model["data_args"])
    return Experiment(
        model={"class_path": model["class_path"], "init_args": merged("init_args", model.get("init_args", {}))},
        data={"class_path": data["class_path"], "init_args": {**data.get("init_args", {}), **data_args}},
        trainer=merged("trainer", model["trainer"]),
        seed=seed,
        accelerator=accelerator,
        model_name=f"{model['label']} {accelerator}" if several else model["label"],
        dataset=data["name"],
        row=data["label"],
        tests={**data.get("tests", {}), **model.get("tests", {})},
        group=data.get("group", ""),
        instead=data.get("instead", {}),
        resources=model.get("resources", {}),
    )


def _without_benchmark(config: Config) -> Config:
    """Translate the shape that `anomalib benchmark` reads."""
    taken = [key for key in ("models", "data", "seeds") if key in config]
    if taken:
        msg = f"benchmark stands in place of {', '.join(taken)}: give one or the other."
        raise ValueError(msg)
    benchmark = config["benchmark"]
    _check_mapping(benchmark, "benchmark")
    check_keys(benchmark, BENCHMARK_KEYS, "benchmark")
    missing = [key for key in BENCHMARK_KEYS if key not in benchmark]
    if missing:
        msg = f"benchmark lacks the key {', '.join(missing)}."
        raise ValueError(msg)
    rest = {key: value for key, value in config.items() if key != "benchmark"}
    seeds = expand(benchmark["seed"], "benchmark.seed")
    models, data = (expand(benchmark[key], f"benchmark.{key}") for key in ("model", "data"))
    return rest | {"models": models, "data": data, "seeds": seeds}


# --- The parts of a configuration ---


def _models(given: list[Config], trainer: Config) -> list[Config]:
    _check_mapping(trainer, "trainer")
    found = []
    for position, entry in enumerate(given):
        where = f"models[{position}]"
        _check_entry(entry, MODEL_KEYS, where)
        _check_mapping(entry.get("trainer", {}), f"{where}.trainer")
        _check_resources(entry.get("resources", {}), f"{where}.resources")
        _check_nested(entry, "by_data", BY_DATA_KEYS, where)
        _check_nested(entry, "tests", TEST_KEYS, where)
        merged = {"data_args": {}, "by_data": {}, **entry, "trainer": {**trainer, **entry.get("trainer", {})}}
        found += _expanded(merged, where)
    return _label(found, _model_labels)


def _data(given: list[Config]) -> list[Config]:
    found = []
    for position, entry in enumerate(given):
        where = f"data[{position}]"
        _check_entry(entry, DATA_KEYS, where)
        _check_nested(entry, "tests", TEST_KEYS, where)
        _check_mapping(entry.get("instead", {}), f"{where}.instead")
        found += _expanded(entry, where)
    return _label(found, _row_labels)


def _expanded(entry: Config, where: str) -> list[Config]:
    class_path = entry["class_path"]
    if isinstance(class_path, str):
        entry = {"name": class_path.rsplit(".", 1)[-1], **entry}
    found = expand(entry, where)
    for each in found:  # after the grids, which may give whole mappings
        for key in ("init_args", "data_args"):
            _check_mapping(each.get(key, {}), f"{where}.{key}")
    return found


def _label(entries: list[Config], labels: Callable[[str, list[Config]], list[str]]) -> list[Config]:
    """Add a `label` to each entry that tells those with the same name apart."""
    by_name = defaultdict(list)
    for entry in entries:
        entry.setdefault("name", str(entry["class_path"]).rsplit(".", 1)[-1])  # where a grid gave the class
        by_name[entry["name"]].append(entry)
    for name, group in by_name.items():
        for entry, label in zip(group, labels(name, differences(group)), strict=True):
            entry["label"] = label
    return entries


def _model_labels(name: str, differing: list[Config]) -> list[str]:
    return [f"{name} {_text(each)}".strip() for each in differing]


def _row_labels(_name: str, differing: list[Config]) -> list[str]:
    """The categories if they alone tell the data apart, otherwise all that differs."""
    categories = [_category(each) for each in differing]
    return categories if len(set(categories)) == len(categories) else [_text(each) for each in differing]


def _category(differing: Config) -> str:
    """The category, or those of a data set that takes several."""
    several = differing.get(CATEGORIES) or []
    return str(differing.get(CATEGORY, several if isinstance(several, str) else ", ".join(several)))


def _text(differing: Config) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in differing.items())


def _seeds(config: Config) -> list[int]:
    seeds = _list(config.get("seeds", [0]), "seeds")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEED_LIMIT:
            msg = f"seeds must be whole numbers in [0, {SEED_LIMIT - 1}], got {seed!r}."
            raise ValueError(msg)
    return seeds


def _accelerators(config: Config) -> list[str]:
    given = config.get("accelerator", "cpu")
    given = given if isinstance(given, list) else [given]
    if not given or any(accelerator not in ACCELERATORS for accelerator in given):
        msg = f"accelerator must be {' or '.join(ACCELERATORS)}, or a list of them, got {config['accelerator']!r}."
        raise ValueError(msg)
    return given


def _metrics(config: Config) -> list[str]:
    metrics = _list(config.get("metrics", METRICS), "metrics")
    if not all(isinstance(metric, str) for metric in metrics):
        msg = f"metrics must be names like {', '.join(METRICS)}, got {metrics!r}."
        raise ValueError(msg)
    return metrics


# --- Checks ---


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        msg = f"{key} must be a list with at least one entry, got {value!r}."
        raise ValueError(msg)
    return value


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        msg = f"{where} must be a mapping, got {value!r}."
        raise ValueError(msg)  # noqa: TRY004  # of a configuration, not of a call


def _check_entry(entry: Any, allowed: list[str], where: str) -> None:
    _check_mapping(entry, where)
    check_keys(entry, allowed, where)
    if not isinstance(entry.get("class_path"), str | dict):
        msg = f"{where} needs a class_path, got {entry.get('class_path')!r}."
        raise ValueError(msg)  # noqa: TRY004  # likewise


def _check_resources(given: Any, where: str) -> None:
    _check_mapping(given, where)
    check_keys(given, RESOURCE_KEYS, where)
    for name, amount in given.items():
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if name == "num_gpus":  # a job trains on one device
            require(f"{where}.{name}", amount, is_number and 0 < amount <= 1, "in (0, 1]")
        elif name == "num_cpus":
            whole = is_number and amount >= 1 and amount == int(amount)
            require(f"{where}.{name}", amount, whole, "a whole number of at least 1")
        else:
            require(f"{where}.{name}", amount, is_number and amount > 0, "a number of bytes above 0")


def _check_nested(entry: Config, key: str, allowed: list[str], where: str) -> None:
    """Check a mapping of names to mappings of mappings."""
    _check_mapping(entry.get(key, {}), f"{where}.{key}")
    for name, given in entry.get(key, {}).items():
        inner = f"{where}.{key}.{name}"
        _check_mapping(given, inner)
        check_keys(given, allowed, inner)
        for part, value in given.items():
            if part != "group":
                _check_mapping(value, f"{inner}.{part}")


def _check_by_data(models: list[Config], data: list[Config]) -> None:
    """Check that settings for a data set or a category are for one that is there."""
    known = dict.fromkeys(name for each in data for name in (each["name"], each["label"]) if name)
    for model in models:
        check_keys(model["by_data"], list(known), f"by_data of model {model['label']}")


def _sections(experiment: Experiment) -> list[tuple[str, Config, str]]:
    """All that is built: a section, what is given for it and what it is called in an error."""
    model, data = f"model {experiment.model_name}", f"data {experiment.dataset} {experiment.row}".rstrip()
    parts = [
        ("model", experiment.model, model),
        ("data", experiment.data, f"{data} of {model}"),
        ("trainer", experiment.trainer, f"trainer of {model}"),
    ]
    for name, test in experiment.tests.items():
        parts += [
            ("model", model_of_test(experiment, name), f"test {name} of {model}"),
            ("data", test.get("data", experiment.data), f"test {name} of {data}"),
        ]
    return parts


def _any_category(given: Config) -> Config:
    """A configuration without the names of categories, which are of the same type in all jobs."""
    named = {key: value for key, value in given.get("init_args", {}).items() if key in {"category", "categories"}}
    types = {key: type(value).__name__ for key, value in named.items()}
    return {**given, "init_args": {**given.get("init_args", {}), **types}}


def model_of_test(experiment: Experiment, test: str) -> Config:
    """The trained model's configuration with what a test changes."""
    changed = experiment.tests[test].get("init_args", {}) if test else {}
    return experiment.model | {"init_args": {**experiment.model["init_args"], **changed}}


def check_experiments(experiments: list[Experiment]) -> None:
    """Check every class with its arguments once, and that no experiment is there twice.

    Raises:
        ValueError: If not. The message says what is allowed.
    """
    seen: set[str] = set()
    titles: dict[str, str] = {}
    for experiment in experiments:
        for section, given, where in _sections(experiment):
            print_of = f"{section} {fingerprint(_any_category(given))}"
            if print_of not in seen:
                seen.add(print_of)
                check_trainer(given, where) if section == "trainer" else check_component(section, given, where)
        if experiment.key in titles:
            msg = f"{experiment.title} is the same job as {titles[experiment.key]}."
            raise ValueError(msg)
        titles[experiment.key] = experiment.title
