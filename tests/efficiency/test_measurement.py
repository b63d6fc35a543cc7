"""One model, measured in this process."""

from pathlib import Path

import anomalib.models
import pytest
import torch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from tiny_model import TinyModel, TinyNet

from anomalib_pack.efficiency import models
from anomalib_pack.efficiency.measurement import measure, measure_or_error
from anomalib_pack.efficiency.settings import Entry, Settings

TINY_PATCHCORE = {"backbone": "resnet18", "layers": ["layer2"], "pre_trained": False, "coreset_sampling_ratio": 0.25}


@pytest.fixture(autouse=True)
def tiny_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomalib.models, "TinyModel", TinyModel, raising=False)


def entry(class_path: str = "TinyModel", **values) -> Entry:
    return Entry(**{"class_path": class_path, "name": "tiny", "precision": "float32", "data": {}} | values)


def settings(**values) -> Settings:
    return Settings(**{"models": [], "warmup": 1, "passes": 2, "batch_sizes": [2, 3]} | values)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_row(precision: str) -> None:
    row = measure(entry(precision=precision), settings())
    assert row["precision"] == precision
    assert row["image_size"] == "32 x 32"  # the pre-processor's
    assert row["parameters"] == (3 * 4 * 16 + 4) + (4 * 3 * 16 + 3)
    assert row["flops"] == 2 * 2 * (3 * 4 * 16) * 64  # convolution and transposed convolution on 8 x 8
    assert (row["bank"], row["bank_values"]) == ("", 0)
    for key in ("latency_mean_ms", "latency_median_ms", "latency_p95_ms", "throughput_2", "throughput_3"):
        assert row[key] > 0, key
    assert 50 < row["peak_memory_mib"] < 20_000
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
    assert seen == {(torch.bfloat16, torch.bfloat16, False, True)}


def test_image_size() -> None:
    row = measure(entry(image_size=[64, 32]), settings())
    assert row["image_size"] == "64 x 32"
    assert row["flops"] == 2 * 2 * (3 * 4 * 16) * 128


def test_unknown_image_size() -> None:
    pre_processor = PreProcessor(transform=torch.nn.Identity())
    row = measure_or_error(entry(init_args={"pre_processor": pre_processor}), settings())
    assert row["error"] == "ValueError: the pre-processor of tiny does not resize images: give an image_size."
    assert "Traceback" in row["traceback"]


def test_failure_is_one_line() -> None:
    row = measure_or_error(entry("NoSuchModel"), settings())
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
    restored = entry("Patchcore", init_args=TINY_PATCHCORE, ckpt_path=str(path), image_size=[64, 64])
    assert measure(restored, settings(batch_sizes=[], passes=1))["bank"] == "7 x 128"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_row_of_a_gpu(precision: str) -> None:
    row = measure(entry(precision=precision), settings(device="cuda"))
    assert row["device_name"] == torch.cuda.get_device_name()
    assert row["latency_median_ms"] > 0
    assert row["peak_memory_mib"] > 0
