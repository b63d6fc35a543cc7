"""Every configuration file fits the classes that it configures."""

import inspect
from pathlib import Path

import anomalib.data
import anomalib.models
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
SWEEPS = [path for path in CONFIGS if "benchmark" in yaml.safe_load(path.read_text())]
RUNS = [path for path in CONFIGS if path not in SWEEPS]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["train", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    given, parsed = yaml.safe_load(path.read_text()), yaml.safe_load(capsys.readouterr().out)
    for part in ("model", "data"):
        for argument, value in given[part].get("init_args", {}).items():
            assert holds(parsed[part]["init_args"][argument], value), argument


def holds(parsed: object, given: object) -> bool:
    """The given value, to whose mappings the parser may have added defaults."""
    if isinstance(given, list):
        return isinstance(parsed, list) and len(parsed) == len(given) and all(map(holds, parsed, given))
    if isinstance(given, dict):
        return isinstance(parsed, dict) and all(holds(parsed.get(key), value) for key, value in given.items())
    return parsed == given


@pytest.mark.parametrize("path", SWEEPS, ids=name_of)
def test_sweep(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())["benchmark"]
    jobs = list(get_iterator_from_grid_dict(sweep))
    assert len(jobs) > 1
    for job in jobs:
        for part, module in (("model", anomalib.models), ("data", anomalib.data)):
            target = getattr(module, job[part]["class_path"])
            inspect.signature(target).bind(**job[part].get("init_args", {}))
