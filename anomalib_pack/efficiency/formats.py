"""A model's files: their size, their speed, and what they find, beside the model itself.

Unlike the network's own row, a pass of a file is that of the whole graph: from an image of any size through
pre-processor, network and post-processor to map, score and label. So is that of ``torch``, which is the model in eager
mode as Anomalib's Torch file holds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.deploy import CompressionType
from anomalib.models import AnomalibModule
from sklearn.metrics import roc_auc_score

from anomalib_pack.efficiency.environment import environment
from anomalib_pack.efficiency.inspection import inspection
from anomalib_pack.efficiency.memory import MIB
from anomalib_pack.efficiency.models import build
from anomalib_pack.efficiency.settings import Entry, Settings
from anomalib_pack.efficiency.timing import latency, pass_times
from anomalib_pack.exporting import check_installed
from anomalib_pack.process import in_own_process
from anomalib_pack.quantizing import quantize_file
from anomalib_pack.region import region_of
from anomalib_pack.runtimes import OnnxRuntime, OpenVinoRuntime, Runtime, TorchRuntime

PRECISIONS = {
    "torch": "float32",
    "onnx": "float32",
    "openvino": "float32",
    "openvino_float16": "float16",
    "openvino_int8": "int8",
}
NEEDS = {"torch": [], "onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"]}


def measure_format(entry: Entry, settings: Settings, kind: str, folder: Path) -> dict[str, Any]:
    """Export a model in another process, and measure the file in this one.

    Args:
        entry: The model.
        settings: Of the run.
        kind: One of ``PRECISIONS``. ``torch`` comes first, and leaves in the folder what the others start from.
        folder: For files.

    Returns:
        A row of the results; its keys are the columns that docs/efficiency.md explains.
    """
    # What exporters leave running would be measured too: OpenVINO's telemetry starts processes, which seek a network.
    file, size = in_own_process(write, entry, settings, kind, folder)
    label = f"{entry.name}, {kind}"
    row: dict[str, Any] = {"format": kind, "precision": PRECISIONS[kind], "size_mib": round(file_size(file) / MIB, 2)}
    # Before the graph is loaded: of two at once ONNX Runtime's threads, which stay awake, would disturb each other.
    source = torch.load(file, weights_only=False)["model"] if kind == "torch" else file
    row |= inspection(source, size, "cpu", settings, label)
    run = load(file, kind)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).numpy()
    device = torch.device("cpu")
    counts = {"warmup": settings.warmup, "passes": settings.passes}
    times = [pass_times(lambda: run(image), device, **counts, label=label) for _ in range(settings.runs)]
    row |= latency(np.stack(times))
    if settings.accuracy_data is not None:
        row |= compared(run, prepared(settings.accuracy_data), kind, folder)
    return {"image_size": f"{size[0]} x {size[1]}", **counts, "runs": settings.runs, **row, **environment(device)}


def write(entry: Entry, settings: Settings, kind: str, folder: Path) -> tuple[Path, tuple[int, int]]:
    """Write the file of a format.

    Returns:
        Its path, and height and width of the images to measure it with.
    """
    torch_file = folder / "weights" / "torch" / "model.pt"
    if kind == "torch":
        model, _ = build(entry, settings.device)
        model.eval().to_torch(folder)
        file = torch_file
    else:
        model = torch.load(torch_file, weights_only=False)["model"].eval()
        calibration = prepared(settings.accuracy_data or entry.data) if kind == "openvino_int8" else None
        file = export(model, kind, folder / kind, calibration)
    height, width = entry.image_size or model.input_size
    return file, (height, width)


def prepared(config: dict[str, Any]) -> AnomalibDataModule:
    """Build a datamodule with its images in place."""
    datamodule = get_datamodule({"data": config})
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def export(model: AnomalibModule, kind: str, folder: Path, datamodule: AnomalibDataModule | None) -> Path:
    """Write a model as a file for images of any size.

    Raises:
        ModuleNotFoundError: If something is not installed; the message says what to install.
    """
    needed = NEEDS[kind.partition("_")[0]] + (["nncf"] if kind == "openvino_int8" else [])
    check_installed(needed, f"The format {kind}")
    if kind == "onnx":
        return model.to_onnx(folder)
    if kind == "openvino_int8":  # as the pack's models do by themselves, for those of others too
        in_float = model.to_openvino(folder / "float32")
        return quantize_file(in_float, folder / "model.xml", datamodule, region_of(model))
    compression = CompressionType.FP16 if kind == "openvino_float16" else None
    return model.to_openvino(folder, compression_type=compression)


def load(file: Path, kind: str) -> Runtime:
    """Load a file of one of ``PRECISIONS``."""
    if kind == "torch":
        return TorchRuntime(torch.load(file, weights_only=False)["model"], "cpu")
    return OnnxRuntime(file, "cpu") if kind == "onnx" else OpenVinoRuntime(file, "cpu")


def file_size(file: Path) -> int:
    """Bytes of a file and of those beside it that hold its weights."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}*") if part.is_file())


def compared(run: Runtime, datamodule: AnomalibDataModule, kind: str, folder: Path) -> dict[str, float | None]:
    """Image AUROC on the test images, and how far maps are from those of ``torch``, as shares of their range."""
    data = datamodule.test_data
    outputs = [run(data[index].image[None].numpy()) for index in range(len(data))]
    labels = data.samples.label_index.to_numpy()
    scores = np.concatenate([output["pred_score"].reshape(-1) for output in outputs])
    row: dict[str, float | None] = {"image_AUROC": float(roc_auc_score(labels, scores))}
    if "anomaly_map" not in outputs[0]:
        return row
    maps = np.stack([output["anomaly_map"].squeeze() for output in outputs])
    reference = folder / "maps.npy"
    if kind == "torch":
        np.save(reference, maps)
    expected = np.load(reference)
    spread = float(expected.max() - expected.min())
    differences = np.abs(maps - expected)
    return row | {
        "map_deviation_mean": float(differences.mean()) / spread,
        "map_deviation_max": float(differences.max()) / spread,
    }
