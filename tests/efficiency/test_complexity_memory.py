"""Counts that can be done by hand, and the size of memory."""

import os

import numpy as np
import pytest
import torch
from anomalib.models import get_model
from torch import nn

from anomalib_pack.efficiency.complexity import flops, learnable_count, parameter_count, profiler_flops
from anomalib_pack.efficiency.memory import bank_size, peak_mib, reset_peak
from anomalib_pack.process import in_own_process

CPU = torch.device("cpu")


def hand_counted() -> nn.Sequential:
    """Images 2 x 8 x 8 -> convolution: 4 x 3 x 3 -> transposed: 3 x 6 x 6 -> linear on rows of 6: 3 x 6 x 5."""
    return nn.Sequential(
        nn.Conv2d(2, 4, kernel_size=3, stride=2), nn.ConvTranspose2d(4, 3, kernel_size=2, stride=2), nn.Linear(6, 5)
    ).eval()


CONV = 2 * (2 * 3 * 3) * (4 * 3 * 3)  # two operations for each weight that an output value sums over
TRANSPOSED = 2 * (3 * 2 * 2) * (4 * 3 * 3)  # the same for each input value
LINEAR = 2 * 6 * (3 * 6 * 5)


def test_parameters() -> None:
    network = hand_counted()
    assert parameter_count(network) == (2 * 4 * 9 + 4) + (4 * 3 * 4 + 3) + (6 * 5 + 5)
    network[1].requires_grad_(requires_grad=False)
    assert learnable_count(network) == (2 * 4 * 9 + 4) + (6 * 5 + 5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_flops(batch_size: int) -> None:
    with torch.inference_mode():
        assert flops(hand_counted(), torch.rand(batch_size, 2, 8, 8)) == batch_size * (CONV + TRANSPOSED + LINEAR)


def test_flops_of_a_layer_whose_input_is_a_parameter() -> None:
    """As FastFlow's have; PyTorch's counter fails at it in inference mode, in which models are measured."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.softplus, self.linear = nn.Parameter(torch.ones(1)), nn.Softplus(), nn.Linear(3, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.softplus(self.scale) * self.linear(images)

    scaled = Scaled()
    with torch.inference_mode():
        assert flops(scaled, torch.ones(1, 3)) == 12


def test_profiler_skips_transposed_convolutions(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.inference_mode():
        assert profiler_flops(hand_counted(), torch.rand(1, 2, 8, 8)) == CONV + LINEAR
    assert not capfd.readouterr().err


def test_flops_of_attention() -> None:
    tokens, dim = 5, 8
    attention = nn.MultiheadAttention(dim, num_heads=2, batch_first=True).eval()

    def attend(images: torch.Tensor) -> torch.Tensor:
        return attention(images, images, images, need_weights=False)[0]

    projections, products = 4 * 2 * tokens * dim * dim, 2 * 2 * tokens * tokens * dim
    assert flops(attend, torch.rand(1, tokens, dim)) == projections + products
    with torch.inference_mode():  # where PyTorch would take a faster way, of operators unknown to its counter
        assert flops(attend, torch.rand(1, tokens, dim)) == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("size", "parameters", "operations"),
    [("small", 8, 76), ("medium", 21, 235)],  # EfficientAD, Table 11
)
def test_table_11(size: str, parameters: int, operations: int) -> None:
    model = get_model({"class_path": "EfficientAd"}, model_size=size).model.eval()
    assert round(parameter_count(model) / 1e6) == parameters
    with torch.inference_mode(), torch.device("meta"):  # shapes without values: counted in no time
        images = torch.rand(1, 3, 256, 256)
        assert round(flops(model.to("meta"), images) / 1e9) == operations


def test_bank_size() -> None:
    network = nn.Module()
    network.register_buffer("mean", torch.zeros(10, 64))
    network.register_buffer("covariance", torch.zeros(64, 10, 10, dtype=torch.float16))
    size = bank_size(network, ["mean", "covariance"])
    assert size["bank"] == "10 x 64 + 64 x 10 x 10"
    assert size["bank_values"] == 640 + 6400
    assert size["bank_mib"] == pytest.approx((4 * 640 + 2 * 6400) / 2**20, abs=0.005)


def peaks() -> list[float]:
    """The peaks before, with and after 256 MiB that are freed again."""
    reset_peak(CPU)
    before = peak_mib(CPU)
    np.ones(2**25)
    allocated = peak_mib(CPU)
    reset_peak(CPU)
    return [before, allocated, peak_mib(CPU)]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be reset here")
def test_peak_memory_of_what_is_freed_again() -> None:
    before, allocated, freed = in_own_process(peaks)  # in this one, other tests' memory may be freed meanwhile
    assert allocated - before == pytest.approx(256, abs=20)
    assert freed - before < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    reset_peak(device)
    before = peak_mib(device)
    torch.ones(2**26, device=device)  # 256 MiB
    assert peak_mib(device) - before == pytest.approx(256, abs=4)
