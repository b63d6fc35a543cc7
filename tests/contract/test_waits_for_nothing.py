"""Contract point 11: on a GPU nothing is left behind and nothing waits, in any precision. No GPU is needed.

Each network is as its paper has it: the class's defaults.
"""

from dataclasses import dataclass

import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule
from cases import Case
from fake_gpu import DEVICE, Watch, gpu_precision, is_there, to_fake_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]
IMAGES = 2

# MiniMaxAd's merged blocks compare addresses, of which fake tensors have none.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@dataclass
class FakeBatch:
    """Anomalib's ``ImageBatch`` takes no fake tensors."""

    image: torch.Tensor
    image_path: list[str]

    def __len__(self) -> int:
        return len(self.image)


@pytest.fixture(scope="module")
def on_gpu(model_class: type[AnomalibModule], case: Case) -> tuple[AnomalibModule, FakeTensorMode]:
    with torch.device("meta"):
        model = model_class(**case.published)
        case.complete(model)
    mode = FakeTensorMode()
    to_fake_gpu(model, mode)
    return model, mode


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inference_waits_for_nothing(on_gpu: tuple, precision: torch.dtype) -> None:
    """Pre-processing, network and post-processing."""
    model, mode = on_gpu
    size = tuple(model.input_size)
    with mode, gpu_precision(precision), Watch(), torch.no_grad():
        result = model.eval()(torch.rand(IMAGES, 3, *size, device=DEVICE))
    assert isinstance(result, InferenceBatch)
    is_there(result.pred_score, (IMAGES,), torch.float32)
    is_there(result.anomaly_map, (IMAGES, 1, *size), torch.float32)
    is_there(result.pred_label, (IMAGES,), torch.bool)
    is_there(result.pred_mask, (IMAGES, 1, *size), torch.bool)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_step_waits_for_nothing(on_gpu: tuple, precision: torch.dtype) -> None:
    """Network and loss, through Lightning's step."""
    model, mode = on_gpu
    size, paths = tuple(model.input_size), [f"{index}.png" for index in range(IMAGES)]
    with mode, gpu_precision(precision), Watch():
        batch = FakeBatch(torch.rand(IMAGES, 3, *size, device=DEVICE), paths)
        loss = model.train().training_step(batch, 0)["loss"]
    is_there(loss, (), torch.float32)


def test_builds_without_memory(model_class: type[AnomalibModule], case: Case) -> None:
    """On the meta device no value can be read; shapes are those of any other."""
    with torch.device("meta"):
        model = model_class(**case.arguments)
    state = model.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    shapes = {key: tensor.shape for key, tensor in model_class(**case.arguments).state_dict().items()}
    assert {key: tensor.shape for key, tensor in state.items()} == shapes
