"""Every configuration file fits the classes that it configures, and its data can be built."""

import inspect
from importlib import metadata
from pathlib import Path

import anomalib.data
import anomalib.models
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models import AnomalibModule
from anomalib.utils.path import convert_to_snake_case
from jsonargparse import Namespace

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
MODELS = [path for path in CONFIGS if path.parent.name == "model"]
RUNS = [path for path in CONFIGS if path not in MODELS and "model" in yaml.safe_load(path.read_text())]
WITH_DATA = [
    path for path in CONFIGS if path.parent.name == "efficiency" and "data" in yaml.safe_load(path.read_text())
]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_model_has_a_file() -> None:
    entries = metadata.distribution("anomalib-pack").entry_points.select(group="anomalib.models")
    assert [path.stem for path in MODELS] == sorted(convert_to_snake_case(entry.name) for entry in entries)


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_model(path: Path) -> None:
    """All arguments with their defaults."""
    [(key, given)] = yaml.safe_load(path.read_text()).items()
    assert key == "model"
    model_class = getattr(anomalib.models, given["class_path"])
    assert convert_to_snake_case(given["class_path"]) == path.stem
    defaults = {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}
    assert list(given["init_args"]) == list(defaults)
    assert given["init_args"] == {
        name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()
    }
    model = AnomalibModule.from_config(path)
    assert type(model) is model_class
    built = {name: model.hparams[name] for name in defaults if name in model.hparams}
    assert built
    assert all(holds(value, given["init_args"][name]) for name, value in built.items())


class DataOnlyCLI(AnomalibCLI):
    """The command with its data, but without the model, which takes long to build and may need weights."""

    def instantiate_classes(self) -> None:
        config = Namespace(data=self.config.train.data)
        self.datamodule = self.subcommand_parsers["train"].instantiate_classes(config).data


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run(path: Path) -> None:
    cli = DataOnlyCLI(["train", "--config", str(path)], run=False)
    assert isinstance(cli.datamodule, AnomalibDataModule)
    given, parsed = yaml.safe_load(path.read_text()), cli.config.train
    for part in ("model", "data"):
        for argument, value in given[part].get("init_args", {}).items():
            assert holds(parsed[part]["init_args"][argument], value), argument


def holds(parsed: object, given: object) -> bool:
    """The given value, to whose mappings the parser may have added defaults."""
    if isinstance(parsed, Namespace):
        parsed = vars(parsed)
    if isinstance(given, list):
        return isinstance(parsed, list | tuple) and len(parsed) == len(given) and all(map(holds, parsed, given))
    if isinstance(given, dict):
        return isinstance(parsed, dict) and all(holds(parsed.get(key), value) for key, value in given.items())
    return parsed == given


@pytest.mark.parametrize("path", WITH_DATA, ids=name_of)
def test_data_of_commands(path: Path) -> None:
    get_datamodule(yaml.safe_load(path.read_text())["data"])
