"""The plugins of third parties, good and bad, in a stock Anomalib: from Python and from the `anomalib` command."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import yaml
from plugin_commands import ANOMALIB, TABLE

# Prints what became of each entry point whose module of Anomalib is there: true, false (waiting), or the error.
STATE = """
import json, sys
from anomalib_pack.plugins import plugins
print(json.dumps({
    f"{p.distribution}:{p.entry_point.name}": p.error or p.loaded for p in plugins() if p.module_name in sys.modules
}))
"""

GOOD = {
    "acme-detectors:AcmeModel",
    "acme-detectors:AcmeData",
    "acme-detectors:acme-report",
    "chain-detectors:Outer",
    "chain-detectors:Inner",
    "clash-first:Contested",
    "engine-detectors:EngineData",
    "lazy-detectors:Lazy",
}
BAD = {
    "broken-detectors:Raises": "RuntimeError: this package is broken",
    "broken-detectors:Exits": "SystemExit: a script without a guard",
    "broken-detectors:Missing": "ModuleNotFoundError: No module named 'broken_missing'",
    "broken-detectors:NotAModel": "TypeError: broken_type:NotAModel is not a subclass of AnomalibModule",
    "broken-detectors:Renamed": "ValueError: the class is called Padim, and Anomalib looks up classes by name",
    "broken-detectors:NoSuchClass": "AttributeError: module 'broken_type' has no attribute 'NoSuchClass'",
    "broken-detectors:broken-parser": "RuntimeError: no parser",
    "clash-second:Contested": "the name belongs to clash_first:Contested of clash-first 1.2",
    "clash-second:PADIM": "ValueError: anomalib.models has a Padim of its own",
    "clash-second:Patchcore": "ValueError: anomalib.models has a Patchcore of its own",
    "clash-second:Folder": "ValueError: anomalib.data has a Folder of its own",
    "clash-second:benchmark": "ValueError: anomalib.cli.pipelines has a benchmark of its own",
    "clash-second:train": "ValueError: anomalib.cli.pipelines has a train of its own",
}


def third_party(state: dict) -> dict:
    return {name: outcome for name, outcome in state.items() if not name.startswith("anomalib-pack:")}


def warnings_of(stderr: str) -> list[str]:
    return sorted(line for line in stderr.splitlines() if "is not registered" in line)


def check_warnings(stderr: str) -> None:
    """One line per broken entry point, with the distribution, the name and the error; nothing about the others.

    Whoever configured the root logger may have put something before it.
    """
    lines = [line for line in warnings_of(stderr) if "anomalib-pack " not in line]
    assert len(lines) == len(BAD)
    for name, error in BAD.items():
        distribution, entry_point = name.split(":")
        start = f"{distribution} 1.2: the entry point {entry_point} = "
        assert [line for line in lines if start in line and line.endswith(error)], name


# --- Anomalib first ---


def test_models_are_anomalibs_own(python):
    python.check("""
import anomalib.models
from anomalib.models import AcmeModel, UnknownModelError, get_model, list_models

assert "AcmeModel" in anomalib.models.__all__
assert {"acme_model", "outer", "inner", "lazy", "contested"} <= list_models()
for spec in ("acme_model", "AcmeModel", {"class_path": "AcmeModel"}, {"class_path": "acme.AcmeModel"},
             {"class_path": "acme.lightning_model.AcmeModel"},
             {"class_path": "anomalib.models.AcmeModel", "init_args": {"width": 4}}):
    assert type(get_model(spec)) is AcmeModel
allowed = {name for name in anomalib.models.ALLOWED_MODULES if not name.startswith("anomalib")}
modules = {"acme", "chain_outer", "chain_inner", "clash_first", "lazy_detectors"}
assert allowed == modules | {"acme.lightning_model", "lazy_detectors.lightning_model"}, allowed
try:
    get_model({"class_path": "acme.torch_model.AcmeTorchModel"})
except UnknownModelError:
    pass
else:
    raise AssertionError("a module that neither is named by an entry point nor defines its class was allowed")

# What Anomalib has stays Anomalib's.
assert anomalib.models.Padim.__module__ == "anomalib.models.image.padim.lightning_model"
assert not {"PADIM", "Renamed", "Raises"} & set(vars(anomalib.models))
assert type(get_model("padim", pre_trained=False)) is anomalib.models.Padim
""")


def test_datamodules_are_anomalibs_own(python, tmp_path):
    python.check(f"""
import anomalib.data
from anomalib.data import AcmeData, get_datamodule

assert "AcmeData" in anomalib.data.__all__
config = {{"class_path": "AcmeData", "init_args": {{"name": "parts", "root": {str(tmp_path)!r}, "normal_dir": "good"}}}}
assert type(get_datamodule({{"data": config}})) is AcmeData
assert anomalib.data.Folder.__module__.startswith("anomalib.")
""")


def test_broken_entry_points_are_one_warning_each(python):
    result = python.check("import anomalib.cli, anomalib.data, anomalib.models" + STATE)
    assert third_party(json.loads(result.stdout)) == dict.fromkeys(GOOD, True) | BAD
    check_warnings(result.stderr)


def test_modules_of_anomalib_look_as_without_plugins(python):
    python.check("""
import importlib, importlib.resources, inspect, pickle, sys
import anomalib.cli.pipelines, anomalib.data, anomalib.models

for name in ("anomalib.data", "anomalib.models", "anomalib.cli.pipelines"):
    module = sys.modules[name]
    assert type(module.__spec__) is importlib.machinery.ModuleSpec
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert importlib.util.find_spec(name) is module.__spec__
    assert inspect.getsource(module).startswith("# Copyright")
assert importlib.resources.files("anomalib.models").joinpath("image").is_dir()
assert pickle.loads(pickle.dumps(anomalib.models.AcmeModel)) is anomalib.models.AcmeModel
""")
    python.check("""
import importlib.util

spec = importlib.util.find_spec("anomalib.models")  # found, never imported
assert spec.submodule_search_locations and spec.loader.get_source("anomalib.models").startswith("# Copyright")
""")


def test_reloading_registers_again(python):
    result = python.check(
        """
import importlib
import anomalib.cli.pipelines, anomalib.data, anomalib.models

model = anomalib.models.AcmeModel
for module in (anomalib.models, anomalib.data, anomalib.cli.pipelines):
    importlib.reload(module)
assert anomalib.models.AcmeModel is model
assert anomalib.models.__all__.count("AcmeModel") == 1
assert "acme" in anomalib.models.ALLOWED_MODULES
assert "AcmeData" in anomalib.data.__all__
assert "acme-report" in anomalib.cli.pipelines.PIPELINE_REGISTRY
"""
        + STATE
    )
    assert third_party(json.loads(result.stdout)) == dict.fromkeys(GOOD, True) | BAD
    check_warnings(result.stderr)


def test_anomalib_survives_the_loss_of_the_pack(python_switched_off, environment, tmp_path):
    shutil.copytree(environment.site_packages / "anomalib_pack", tmp_path / "anomalib_pack")
    result = python_switched_off.check(f"""
import shutil, sys
sys.path.insert(0, {str(tmp_path)!r})
import anomalib_pack
shutil.rmtree({str(tmp_path / "anomalib_pack")!r})
import anomalib.models
assert anomalib.models.Padim
""")
    assert "The plugins of anomalib.models could not be registered." in result.stderr


# --- Whatever is imported first ---

FIRST = [
    "import anomalib.data",
    "import anomalib.models",
    "import anomalib.engine",
    "import anomalib.cli",
    "import anomalib.pipelines",
    "from anomalib.models.image.padim import Padim",
    "import acme",
    "import acme.lightning_model",
    "import acme.torch_model",
    "import acme.data",
    "import acme.report",
    "import acme_common",
    "import chain_outer",
    "import engine_detectors",
    "import lazy_detectors.lightning_model",
    "import anomalib_pack",
    "import anomalib_pack.data",
    "import anomalib_pack.backbones",
    "import anomalib_ulsad",
    "import anomalib_ulsad.torch_model",
    "import pickle; pickle.loads(b'cacme.lightning_model\\nAcmeModel\\n.')",
    "import pickle; pickle.loads(b'canomalib_ulsad.lightning_model\\nUlsad\\n.')",
    "import anomalib_ulsad.no_such_module",
]


@pytest.mark.parametrize("first", FIRST)
def test_registration_ends_complete(python, first):
    result = python.check(f"""
try:
    {first}
except ModuleNotFoundError as error:
    assert error.name == "anomalib_ulsad.no_such_module"
{STATE}
import anomalib.cli
{STATE}""")
    at_once, at_last = map(json.loads, result.stdout.splitlines())
    assert False not in at_once.values()
    assert third_party(at_last) == dict.fromkeys(GOOD, True) | BAD
    own = {name: outcome for name, outcome in at_last.items() if name.startswith("anomalib-pack:")}
    assert set(own.values()) == {True}
    check_warnings(result.stderr)


@pytest.mark.parametrize("first", ["anomalib.engine", "anomalib.cli", "anomalib.models", "engine_detectors"])
def test_plugins_find_anomalib_whole(python, first):
    """Anomalib imports its data modules early on, when a plugin could not have its engine."""
    python.check(f"""
import {first}
from anomalib.data import EngineData
from anomalib.engine import Engine
assert EngineData.engine is Engine
""")


def test_model_that_is_unpickled_first(python, tmp_path):
    """As with a model that Anomalib exported: the file makes Python import the plugin."""
    path = tmp_path / "model.pt"
    python.check(f"""
import torch
from anomalib.models import get_model
torch.save({{"model": get_model("acme_model")}}, {str(path)!r})
""")
    python.check(f"""
import sys, torch
model = torch.load({str(path)!r}, weights_only=False)["model"]
assert type(model) is sys.modules["anomalib.models"].AcmeModel
""")


CONCURRENT = """
import threading
errors = []
barrier = threading.Barrier(4)

def load(name, attribute):
    barrier.wait()
    try:
        module = __import__(name, fromlist=[attribute])
        getattr(module, attribute)
    except BaseException as error:
        errors.append((name, repr(error)))

names = [({first!r}, "__name__"),
         ("anomalib.models", "Padim"), ("anomalib.data", "Folder"), ("anomalib.engine", "Engine")]
threads = [threading.Thread(target=load, args=name, daemon=True) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
    assert not thread.is_alive(), "deadlock"
assert not errors, errors
import anomalib.cli
"""


@pytest.mark.parametrize("first", ["acme", "acme.torch_model", "chain_outer", "lazy_detectors.lightning_model"])
def test_concurrent_imports(python, first):
    for _ in range(5):
        result = python.run(CONCURRENT.format(first=first) + STATE)
        # Two threads that import a package and a module of it at once: https://github.com/python/cpython/issues/83065.
        if "_DeadlockError" not in result.stderr:
            break
    assert result.returncode == 0, result.stdout + result.stderr
    assert third_party(json.loads(result.stdout)) == dict.fromkeys(GOOD, True) | BAD
    check_warnings(result.stderr)


# --- Switched off, and other ways to install ---


def test_switched_off_anomalib_is_stock(python_switched_off):
    result = python_switched_off.check("""
import sys
import anomalib.cli, anomalib.data, anomalib.models
assert not hasattr(anomalib.models, "AcmeModel") and not hasattr(anomalib.data, "AcmeData")
assert not [name for name in sys.modules if name.startswith("anomalib_pack")]
""")
    assert warnings_of(result.stderr) == []


@pytest.mark.parametrize(
    "order",
    [
        "import anomalib.cli, anomalib_pack",
        "import anomalib_pack, anomalib.cli",
        "import acme, anomalib.cli, anomalib_pack",
    ],
)
def test_switched_off_importing_the_pack_registers(python_switched_off, order):
    result = python_switched_off.check(f"{order}; from anomalib.models import AcmeModel" + STATE)
    assert third_party(json.loads(result.stdout)) == dict.fromkeys(GOOD, True) | BAD
    check_warnings(result.stderr)


def test_zip_on_the_path(python_switched_off, wheel, tmp_path):
    """A zip is no site directory, so its start-up line does not run; importing the pack is what is left."""
    archive = shutil.copy(wheel, tmp_path / "anomalib_pack.zip")
    result = python_switched_off.check(f"""
import sys
sys.path.insert(0, {str(archive)!r})
import anomalib_pack
assert anomalib_pack.__file__.startswith({str(archive)!r})
from anomalib.models import AcmeModel
import anomalib.cli
{STATE}""")
    state = json.loads(result.stdout)
    assert third_party(state) == dict.fromkeys(GOOD, True) | BAD
    assert state["anomalib-pack:Ulsad"] is True


# --- Commands ---


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump({"parts": 7}))
    return path


def test_command_in_a_process_of_its_own(environment):
    command = Path(sysconfig.get_path("scripts")) / "anomalib"
    arguments = ["--model", "AcmeModel", "--model.width", "5", "--data", "AcmeData", "--data.name", "parts"]
    result = environment.run(command, "train", *arguments, "--print_config")
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    assert printed["model"] == {"class_path": "acme.AcmeModel", "init_args": {"width": 5}}
    assert printed["data"]["class_path"] == "acme.data.AcmeData"
    check_warnings(result.stderr)


def test_command_lists_and_runs_pipelines(python, config):
    shown = python.check(ANOMALIB, "--help").stdout
    assert "acme-report" in shown
    assert "Write a report." in shown
    assert "broken-parser" not in shown
    assert "acme-report runs with {'parts': 7}" in python.check(ANOMALIB, "acme-report", "--config", str(config)).stdout


def test_table(python):
    result = python.run(TABLE)
    assert result.returncode == 1
    rows = {line.split()[0]: line.split(maxsplit=4)[1:] for line in result.stdout.split("\n\n")[0].splitlines()}
    assert rows["AcmeModel"] == ["acme-detectors", "1.2", "anomalib.models", "loaded"]
    assert rows["Raises"] == ["broken-detectors", "1.2", "anomalib.models", BAD["broken-detectors:Raises"]]


def test_table_where_all_is_well(python_switched_off, environment, wheel):
    code = (
        f"import sys; sys.path.remove({str(environment.site_packages)!r}); sys.path.insert(0, {str(wheel)!r}); {TABLE}"
    )
    result = python_switched_off.run(code, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    ulsad = {"name": "Ulsad", "distribution": "anomalib-pack", "group": "anomalib.models", "status": "loaded"}
    assert [row for row in report["plugins"] if ulsad.items() < row.items()]
    assert report["errors"] == []
    assert report["versions"]["anomalib"].startswith("2.")
    assert set(report["versions"]) == {"anomalib", "torch", "lightning", "timm", "faiss", "CUDA"}


def test_table_where_anomalib_is_broken(python, tmp_path):
    (tmp_path / "anomalib.py").write_text("raise ImportError('a library is missing')")
    result = python.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {TABLE}")
    assert result.returncode == 1
    assert "anomalib.models: ImportError: a library is missing" in result.stdout.splitlines()
    assert "not loaded" in result.stdout
