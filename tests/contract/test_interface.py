"""Contract points 1 to 3: how a model is found, built and called."""

import inspect
from pathlib import Path

import anomalib.models
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule, get_model, list_models
from anomalib.utils.path import convert_to_snake_case
from cases import CASES, Case, registered_models
from runs import quiet_engine
from torch import nn

from anomalib_pack.data import MVTecLoco

ROOT = Path(__file__).parents[2]
PLAIN = (bool, int, float, str, Path, type(None))


def test_every_registered_model_has_a_case() -> None:
    assert registered_models()
    assert registered_models() == sorted(CASES)


def test_found_by_name(name: str, model_class: type[AnomalibModule], case: Case) -> None:
    assert convert_to_snake_case(name) in list_models()
    assert name in anomalib.models.__all__
    assert AnomalibModule in model_class.__bases__
    for request in (
        name.lower(),
        {"class_path": name},
        {"class_path": f"{model_class.__module__.split('.')[0]}.{name}"},
        {"class_path": f"{model_class.__module__}.{name}"},
    ):
        assert type(get_model(request, **case.arguments)) is model_class


def test_builds_with_its_defaults(model_class: type[AnomalibModule]) -> None:
    model = model_class()
    assert model.trainer_arguments["num_sanity_val_steps"] == 0
    assert model.input_size is not None


def test_arguments_are_plain_and_documented(model_class: type[AnomalibModule]) -> None:
    components = {"pre_processor", "post_processor", "evaluator", "visualizer"}
    parameters = inspect.signature(model_class).parameters
    assert components <= parameters.keys()
    documentation = inspect.getdoc(model_class)
    for parameter in parameters.values():
        values = parameter.default if isinstance(parameter.default, tuple) else (parameter.default,)
        assert all(isinstance(value, PLAIN) for value in values), parameter
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert f"{parameter.name}: " in documentation, parameter


def test_impossible_values_are_named(model_class: type[AnomalibModule], case: Case) -> None:
    for argument, value in case.impossible.items():
        with pytest.raises(ValueError, match=argument) as failure:
            model_class(**(case.arguments | {argument: value}))
        given = value[0] if isinstance(value, list) else value
        assert str(given) in str(failure.value)


def test_the_word_for_weights_of_stock_models_is_explained(model_class: type[AnomalibModule], case: Case) -> None:
    expected = "no argument pre_trained, but .*weights" if "weights" in case.arguments else "pre_trained"
    with pytest.raises(TypeError, match=expected):
        model_class(**case.arguments, pre_trained=False)


def test_torch_model_is_free_of_lightning(model: AnomalibModule) -> None:
    for module in model.model.modules():
        assert isinstance(module, nn.Module)
        assert not isinstance(module, AnomalibModule)
    package = ROOT / type(model).__module__.split(".")[0]
    wiring = {"lightning_model.py", "visualizer.py", "__init__.py"}
    for file in package.glob("*.py"):
        assert ".cuda(" not in file.read_text()
        assert "lightning" not in file.read_text() or file.name in wiring, file


def images(size: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_inference(model: AnomalibModule, case: Case) -> None:
    network = model.model.eval()
    for size in (tuple(model.input_size), case.other_size):
        result = network(images(size))
        assert isinstance(result, InferenceBatch)
        assert result.pred_score.shape == (3,)
        assert result.anomaly_map.shape == (3, 1, *size)
        assert result.pred_score.isfinite().all()
        assert result.anomaly_map.isfinite().all()


@torch.no_grad()
def test_an_image_scores_the_same_in_any_batch(model: AnomalibModule) -> None:
    network, batch = model.model.eval(), images(tuple(model.input_size))
    together = network(batch)
    alone = [network(image.unsqueeze(0)) for image in batch]
    reverse = network(batch.flip(0))
    torch.testing.assert_close(together.pred_score, torch.cat([one.pred_score for one in alone]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.anomaly_map, reverse.anomaly_map.flip(0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-1)])
def test_cuda_agrees_with_the_cpu(model: AnomalibModule, precision: torch.dtype, tolerance: float) -> None:
    network, batch = model.model.eval(), images(tuple(model.input_size))
    on_cpu = network(batch).anomaly_map
    with torch.autocast("cuda", dtype=precision, enabled=precision != torch.float32):
        on_gpu = network.cuda()(batch.cuda()).anomaly_map.float().cpu()
    assert (on_gpu - on_cpu).abs().mean() < tolerance * (on_cpu.max() - on_cpu.min())


def test_size_that_the_networks_cannot_take(
    model_class: type[AnomalibModule], case: Case, loco: MVTecLoco, tmp_path: Path
) -> None:
    """Named when the trainer sets up, and again when images of that size come in; a model can be built with any."""
    refused = model_class(**case.arguments, pre_processor=model_class.configure_pre_processor(case.refused_size))
    engine = quiet_engine(tmp_path)
    for run in (engine.fit, engine.test):
        with pytest.raises(ValueError, match=str(case.refused_size[0])):
            run(refused, datamodule=loco)
    with pytest.raises(ValueError, match=str(case.refused_size[0])):
        refused.model.eval()(images(case.refused_size))


def test_documents_name_the_model(name: str, model_class: type[AnomalibModule]) -> None:
    package = model_class.__module__.split(".")[0]
    for document in ("README.md", "CHANGELOG.md", f"{package}/README.md"):
        assert name in (ROOT / document).read_text(), document
