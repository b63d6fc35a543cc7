"""One model, measured in this process."""

import os
from pathlib import Path

import anomalib.models
import pytest
import torch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from tiny_model import TinyModel, TinyNet

from anomalib_pack.efficiency import models
from anomalib_pack.efficiency.measurement import measure, or_error
from anomalib_pack.efficiency.settings import Entry, Settings
from anomalib_pack.efficiency.timing import networks_alone
from anomalib_pack.process import in_own_process

TINY_PATCHCORE = {"backbone": "resnet18", "layers": ["layer2"], "pre_trained": False, "coreset_sampling_ratio": 0.25}


@pytest.fixture(autouse=True)
def tiny_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomalib.models, "TinyModel", TinyModel, raising=False)


def entry(class_path: str = "TinyModel", **values) -> Entry:
    return Entry(**{"class_path": class_path, "name": "tiny", "precision": "float32", "data": {}} | values)


def settings(**values) -> Settings:
    return Settings(**{"models": [], "warmup": 1, "passes": 2, "runs": 2, "batch_sizes": [3, 2]} | values)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_row(precision: str) -> None:
    row = measure(entry(precision=precision), settings())
    assert row["precision"] == precision
    assert row["image_size"] == "32 x 32"  # the pre-processor's
    assert row["parameters"] == row["learnable_parameters"] == (3 * 4 * 16 + 4) + (4 * 3 * 16 + 3)
    assert row["flops"] == 2 * 2 * (3 * 4 * 16) * 64  # convolution and transposed convolution on 8 x 8
    assert (row["bank"], row["bank_values"]) == ("", 0)
    for key in ("latency_mean_ms", "latency_median_ms", "latency_p95_ms"):
        assert row[key] > 0, key
    assert row["latency_std_ms"] >= 0  # which two runs may be so near to that it is rounded
    assert (row.get("inspector_mean_ms", 0) > 0) == (precision == "float32")
    for batch in (2, 3):
        assert row[f"throughput_{batch}"] > 0
        assert row[f"throughput_std_{batch}"] >= 0
    for key in ("peak_memory_mib", "peak_memory_mib_2", "peak_memory_mib_3"):
        assert 50 < row[key] < 20_000
    assert row["device_name"]
    assert row["threads"] == torch.get_num_threads()
    assert row["torch"] == torch.__version__.split("+")[0]


def test_network_and_images_have_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = set(), TinyNet.forward

    def forward(self, images):
        seen.add((images.dtype, self.encode.weight.dtype, self.training, torch.is_inference_mode_enabled()))
        return original(self, images)

    monkeypatch.setattr(TinyNet, "forward", forward)
    measure(entry(precision="bfloat16"), settings())
    timed, counted = True, False  # in inference mode, or not
    assert seen == {(torch.bfloat16, torch.bfloat16, False, mode) for mode in (timed, counted)}


def test_passes_of_each_run_and_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and timed passes in each run; batch size 1 once, and no batch size after a larger one."""
    sizes, original = [], TinyNet.forward

    def forward(self, images):
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(TinyNet, "forward", forward)
    measure(entry(), settings(runs=3, batch_sizes=[8, 1]))
    alone, inspector, larger = 3 * (1 + 2) * [1], [1] + 3 * (1 + 2) * [1], 3 * (1 + 2) * [8]  # an inspector warms up
    assert sizes == alone + inspector + larger + [1, 1, 1]  # one before FLOPs are counted, and the two counts


def measured_where_an_image_takes_64_mib() -> dict:
    """Batches of 1, 2 and 4 images."""
    original = TinyNet.forward

    def forward(self, images):
        torch.ones(len(images), 2**24)
        return original(self, images)

    TinyNet.forward = forward
    anomalib.models.TinyModel = TinyModel
    return measure(entry(), settings(runs=1, batch_sizes=[4, 2]))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be reset here")
def test_memory_of_each_batch_size() -> None:
    """A large batch takes more than a small one, and each its own peak.

    In a process of its own, as models are measured: freed memory of other tests would serve the first passes.
    """
    row = in_own_process(measured_where_an_image_takes_64_mib)
    assert row["peak_memory_mib_2"] - row["peak_memory_mib"] == pytest.approx(64, abs=30)
    assert row["peak_memory_mib_4"] - row["peak_memory_mib"] == pytest.approx(192, abs=30)


def test_networks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = set(), TinyNet.forward

    def forward(self, images):
        seen.add((self.training, self.encode.training))
        return original(self, images)

    monkeypatch.setattr(TinyNet, "forward", forward)
    row = measure(entry(), settings(protocol="networks"))
    assert seen == {(True, False), (False, False)}  # passes, and what is counted
    assert row["protocol"] == "networks"
    assert row["throughput_2"] > 0


@pytest.mark.parametrize("name", ["MiniMaxAd", "Uniad", "ReverseDistillation"])
def test_networks_alone_are_what_table_6_times(name: str) -> None:
    """Features and their reconstruction, of layers in eval mode: the map follows from them."""
    small = {
        "MiniMaxAd": {"encoder": "timm:resnet18", "weights": None},
        "Uniad": {"backbone": "resnet18", "layers": ["layer1", "layer2"], "weights": None, "hidden_dim": 32},
        "ReverseDistillation": {"backbone": "resnet18", "pre_trained": False},
    }[name]
    network = models.build(entry(name, init_args=small), "cpu")[0].model.eval()
    with torch.inference_mode():
        encoded, decoded = networks_alone(network, torch.rand(1, 3, 256, 256), torch.device("cpu"))()
    pairs = [(encoded, decoded)] if isinstance(encoded, torch.Tensor) else list(zip(encoded, decoded, strict=True))
    assert all(theirs.shape == ours.shape for theirs, ours in pairs)


def test_image_size() -> None:
    row = measure(entry(image_size=[64, 32]), settings())
    assert row["image_size"] == "64 x 32"
    assert row["flops"] == 2 * 2 * (3 * 4 * 16) * 128


def test_unknown_image_size() -> None:
    pre_processor = PreProcessor(transform=torch.nn.Identity())
    row = or_error(measure, entry(init_args={"pre_processor": pre_processor}), settings())
    assert row["error"] == "ValueError: the pre-processor of tiny does not resize images: give an image_size."
    assert "Traceback" in row["traceback"]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_networks_that_cannot_run_in_half_precision(precision: str) -> None:
    """Anomalib's EfficientAd; if this fails, it can, and docs/efficiency.md and the configurations say otherwise."""
    row = or_error(measure, entry("EfficientAd", precision=precision), settings())
    assert row["error"].startswith("RuntimeError: Input type (float) and bias type (")


def test_failure_is_one_line() -> None:
    row = or_error(measure, entry("NoSuchModel"), settings())
    assert "has no attribute 'NoSuchModel'" in row["error"]
    assert "\n" not in row["error"]


def test_fitted_bank(loco_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, which has imported everything already.
    monkeypatch.setattr(models, "in_own_process", lambda function, *arguments: function(*arguments))
    data = {
        "class_path": "MVTecLoco",
        "init_args": {"root": str(loco_root), "category": "tray", "num_workers": 0, "train_batch_size": 4},
    }
    patchcore = entry("Patchcore", init_args=TINY_PATCHCORE, image_size=[64, 64], data=data)
    row = measure(patchcore, settings(batch_sizes=[]))
    refused = or_error(measure, patchcore, settings(protocol="networks"))["error"]
    assert refused.startswith("ValueError: tiny has a memory bank")
    kept = 13 * 8 * 8 // 4  # images, locations, sampling ratio
    assert row["bank"] == f"{kept} x 128"
    assert row["bank_values"] == kept * 128
    assert row["bank_mib"] == pytest.approx(kept * 128 * 4 / 2**20, abs=0.005)


def test_checkpoint(tmp_path: Path) -> None:
    model = Patchcore(**TINY_PATCHCORE)
    model.model.memory_bank = torch.rand(7, 128)
    path = tmp_path / "model.ckpt"
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": TINY_PATCHCORE | {"pre_trained": True},  # the download is not repeated
            "pytorch-lightning_version": "2.6.0",
        },
        path,
    )
    # Backbone and layers are the checkpoint's, not the defaults: the bank is still what fitting has made.
    restored = entry("Patchcore", init_args={"pre_trained": False}, ckpt_path=str(path), image_size=[64, 64])
    assert measure(restored, settings(batch_sizes=[], passes=1))["bank"] == "7 x 128"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_row_of_a_gpu(precision: str) -> None:
    row = measure(entry(precision=precision), settings(device="cuda"))
    assert row["device_name"] == torch.cuda.get_device_name()
    assert row["latency_median_ms"] > 0
    assert row["peak_memory_mib"] > 0
