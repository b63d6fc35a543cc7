"""The protocol of the passes."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from tiny_model import TinyNet

from anomalib_pack.efficiency import timing
from anomalib_pack.efficiency.timing import inference, latency, networks_alone, pass_times, throughput

CPU = torch.device("cpu")


class Recorder(TinyNet):
    """Notes the images of each call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(images)
        return super().forward(images)


def test_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the passes move: each by one second more than the one before."""
    network = Recorder().eval()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: sum(range(len(network.calls) + 1))))
    one_pass = inference(network, torch.rand(2, 3, 16, 16), CPU)
    times = pass_times(one_pass, CPU, warmup=3, passes=5, label="")
    assert times.tolist() == [4, 5, 6, 7, 8]
    assert len(network.calls) == 8


def test_a_pass_ends_with_the_map_on_the_cpu() -> None:
    network, images = Recorder().eval(), torch.rand(2, 3, 16, 16)
    maps = inference(network, images, CPU)()
    torch.testing.assert_close(maps, network(images).anomaly_map)
    assert network.calls[0] is images


def test_model_without_maps() -> None:
    scores = torch.rand(2)
    result = inference(lambda _images: InferenceBatch(pred_score=scores), torch.rand(2, 3, 16, 16), CPU)()
    assert result is scores


class Trainable(TinyNet):
    """Notes the modes of itself and of its layers."""

    def __init__(self):
        super().__init__()
        self.modes = set()

    def forward(self, images):
        self.modes.add((self.training, self.encode.training))
        return super().forward(images)


def test_networks_alone() -> None:
    """What the loss takes, of layers in eval mode; nothing is left behind."""
    network, images = Trainable().eval(), torch.rand(2, 3, 16, 16)
    one_pass = networks_alone(network, images, CPU)
    error = one_pass()
    assert network.modes == {(True, False)}
    assert not network.training
    torch.testing.assert_close(20 + 100 * error, network(images).anomaly_map)


class NeedsTargets(TinyNet):
    def forward(self, images, targets=None):
        return images - targets if self.training else super().forward(images)


class AlwaysPredicts(TinyNet):
    def forward(self, images):
        return InferenceBatch(pred_score=images.amax(dim=(1, 2, 3)), anomaly_map=images[:, :1])


@pytest.mark.parametrize("network_class", [NeedsTargets, AlwaysPredicts])
def test_networks_that_do_not_run_alone(network_class: type[TinyNet]) -> None:
    network = network_class().eval()
    with pytest.raises(ValueError, match="do not run alone"):
        networks_alone(network, torch.rand(1, 3, 16, 16), CPU)
    assert not network.training


def test_latency() -> None:
    times = np.arange(1, 102) / 1000  # 1 to 101 ms
    times[0] = 0.102  # the mean feels it
    found = latency(np.random.default_rng(0).permutation(times)[None])
    assert found == {
        "latency_mean_ms": 52.0,
        "latency_std_ms": None,  # of a single run
        "latency_median_ms": 52.0,
        "latency_p95_ms": 97.0,
    }


def test_latency_of_runs() -> None:
    """The deviation is that of the runs, not of the passes."""
    found = latency(np.array([[0.001, 0.003], [0.003, 0.005], [0.005, 0.007]]))
    assert found == {
        "latency_mean_ms": 4.0,
        "latency_std_ms": 2.0,
        "latency_median_ms": 4.0,
        "latency_p95_ms": 6.5,
    }


def test_throughput() -> None:
    assert throughput(np.full((1, 1000), 0.032), batch_size=16) == (500.0, None)  # Sec. 5: 16 000 by the sum
    times = np.array([[0.01, 0.03], [0.02, 0.08]])  # 40 and 10 passes a second
    assert throughput(times, batch_size=2) == (pytest.approx(70), pytest.approx(60 / 2**0.5, abs=1e-3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_see_the_whole_pass() -> None:
    device = torch.device("cuda")
    network = TinyNet().eval().to(device)
    one_pass = inference(network, torch.rand(4, 3, 512, 512), device)
    start = time.perf_counter()
    times = pass_times(one_pass, device, warmup=0, passes=20, label="")
    assert one_pass().device == CPU
    assert 0 < times.sum() <= time.perf_counter() - start
