"""What a configuration of `anomalib efficiency` may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from anomalib_pack.checks import check_keys

Precision = Literal["float32", "float16", "bfloat16"]
Protocol = Literal["prediction", "networks"]
Format = Literal["torch", "onnx", "openvino", "openvino_float16", "openvino_int8"]

# Sec. 5: PatchCore is measured on VisA's cashew, which has 450 training images.
DEFAULT_DATA = {
    "class_path": "SyntheticLoco",
    "init_args": {"root": "./datasets/SyntheticLocoEfficiency", "num_train": 450, "num_val": 2, "num_test": 1},
}


@dataclass
class Settings:
    """Measure latency, throughput, parameters, FLOPs and memory of models.

    Args:
        models: Each with `class_path` and `init_args` as in `anomalib benchmark`, and optionally `ckpt_path` (a trained
            checkpoint), `name` (in the tables), `image_size` ([height, width] in pixels, if not the model's own),
            `precision` and `data` (in place of those below), and `may_fail` (then its failure is a row of the tables,
            but not one of the command).
        device: `cpu`, `cuda` or `cuda:N`.
        precision: Type of the network's weights and of the images.
        protocol: What a pass is. `prediction`: from before the copy of the images to the device until the anomaly maps
            are on the CPU (EfficientAD). `networks`: from images on the device to what the maps are computed from, as
            the networks give it to their loss, without the maps and without copies (MiniMaxAD's frames per second).
        warmup: Passes before the timed ones, for each run and batch size.
        passes: Timed passes, for each run and batch size.
        runs: How often warm-up and timed passes are repeated; the tables have mean and standard deviation over runs.
        batch_sizes: Batch sizes whose throughput and memory are measured. The latency is that of batch size 1.
        data: Datamodule that models with a memory bank are fitted on, with `class_path` and `init_args`. By default
            450 images of `SyntheticLoco`, rendered at the first use: the paper's PatchCore is fitted on 450.
        formats: Files of each model to measure too, as a whole and on the CPU: from the image to map, score and label.
            `torch` (eager mode) is always among them.
        accuracy_data: Datamodule on whose test images each format is scored and compared with `torch`; INT8 is
            calibrated with its normal validation images, or else with those of `data`.
        results: CSV file with a column `model` or `model.class_path`, as `anomalib benchmark` writes it: a plot of
            latency against accuracy is drawn.
        metric: Column of `results` that is the accuracy.
    """

    models: list[dict[str, Any]]
    device: str = "cpu"
    precision: Precision = "float32"
    protocol: Protocol = "prediction"
    warmup: NonNegativeInt = 1000
    passes: PositiveInt = 1000
    runs: PositiveInt = 5
    batch_sizes: list[PositiveInt] = field(default_factory=lambda: [16])
    data: dict[str, Any] | None = None  # a default with a class_path would be jsonargparse's to interpret
    formats: list[Format] = field(default_factory=list)
    accuracy_data: dict[str, Any] | None = None
    results: Path | None = None
    metric: str = "image_AUROC"


@dataclass
class Entry:
    """One of the models to measure; the values are those of ``Settings.models``."""

    class_path: str
    name: str
    precision: str
    data: dict[str, Any]
    init_args: dict[str, Any] = field(default_factory=dict)
    ckpt_path: str | None = None
    image_size: Sequence[int] | None = None
    may_fail: bool = False


def entries(settings: Settings) -> list[Entry]:
    """The models to measure.

    Raises:
        ValueError: If an entry has an unknown key, lacks its class or has an impossible value, or a name is used twice.
    """
    found = [_entry(position, given, settings) for position, given in enumerate(settings.models)]
    names = [entry.name for entry in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = f"models must have different names, got {', '.join(twice)} more than once. Give each a `name`."
        raise ValueError(msg)
    return found


def _entry(position: int, given: dict[str, Any], settings: Settings) -> Entry:
    where = f"models[{position}]"
    check_keys(sorted(given), [field.name for field in fields(Entry)], where)
    if "class_path" not in given:
        msg = f"{where} needs a class_path, e.g. Patchcore."
        raise ValueError(msg)
    defaults = {
        "name": given["class_path"].rsplit(".", maxsplit=1)[-1],
        "precision": settings.precision,
        "data": settings.data or DEFAULT_DATA,
    }
    entry = Entry(**defaults | given)
    if entry.precision not in Precision.__args__:
        msg = f"precision of {where} must be one of {', '.join(Precision.__args__)}, got {entry.precision!r}."
        raise ValueError(msg)
    if entry.image_size is not None and (len(entry.image_size) != 2 or min(entry.image_size) < 1):
        msg = f"image_size of {where} must be [height, width], got {entry.image_size!r}."
        raise ValueError(msg)
    if entry.ckpt_path is not None and not Path(entry.ckpt_path).is_file():
        msg = f"ckpt_path of {where} must be a file, got {entry.ckpt_path!r}."
        raise ValueError(msg)
    return entry


def check_device(name: str) -> None:
    """Check that a device is there.

    Raises:
        ValueError: If not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        msg = f"device must be cpu, cuda or cuda:N, got {name!r}."
        raise ValueError(msg)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"device {name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices."
        raise ValueError(msg)
