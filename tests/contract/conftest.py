"""Fixtures of the contract suite: each registered model, built, and trained once through the real command."""

import os
from pathlib import Path

import anomalib.models
import pytest
import torch
from anomalib.models import AnomalibModule
from cases import CASES, Case, registered_models
from filelock import FileLock
from runs import SEED, Trained, run_command, write_config

QUICK = ("test_half_precision", "test_interface", "test_waits_for_nothing")  # files that take seconds for any model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what would take minutes: everything of a slow model but what is quick for any, and slow checks of others."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name not in CASES:
            continue
        is_slow = CASES[name].slow and item.module.__name__ not in QUICK
        if is_slow or item.originalname in CASES[name].slow_checks:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", params=registered_models())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture(autouse=True)
def _known_failure(request: pytest.FixtureRequest, case: Case) -> None:
    reason = case.xfail.get(request.function.__name__)
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session")
def model_class(name: str) -> type[AnomalibModule]:
    return getattr(anomalib.models, name)


@pytest.fixture
def model(model_class: type[AnomalibModule], case: Case) -> AnomalibModule:
    """A small, untrained model."""
    torch.manual_seed(SEED)
    return model_class(**case.arguments)


@pytest.fixture(scope="session")
def trained(name: str, case: Case, loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The first process that needs it trains, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"trained_{name}"
    config, log = folder / "config.yaml", folder / "output.txt"
    with FileLock(shared / f"trained_{name}.lock"):
        if not log.is_file():
            folder.mkdir(exist_ok=True)
            every = {"check_val_every_n_epoch": case.epochs}
            run = run_command(
                "train", "--config", write_config(config, name, case, loco_root, folder / "results", **every)
            )
            output = run.stdout + run.stderr
            assert run.returncode == 0, output[-5000:]
            log.write_text(output)
    latest = folder / "results" / name / "MVTecLoco" / "tray" / "latest"
    return Trained(config, latest, latest / "weights" / "lightning" / "model.ckpt", log.read_text())
