"""Models in PyTorch, ONNX Runtime and OpenVINO behind one call: images in, arrays out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models.components import AnomalibModule

from .exporting import branch_outputs, check_installed, detailed, raw_score

Outputs = dict[str, np.ndarray]
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # OpenVINO's default is bfloat16 where the processor has it


class Runtime:
    """Runs a graph, from images (B, 3, H, W), float32 RGB in [0, 1], to its outputs by name.

    Attributes:
        image_size: Height and width that the graph takes; None for any.
        batch_size: Number of images that it takes; None for any.
        outputs: Names of outputs, where they are known before it runs.
    """

    image_size: tuple[int, int] | None = None
    batch_size: int | None = None
    outputs: Sequence[str] = ()

    def __call__(self, images: np.ndarray) -> Outputs:
        """Run the graph."""
        raise NotImplementedError


class TorchRuntime(Runtime):
    """A model in eager mode. Outputs are those of its exports with extra ones, and the map before post-processing.

    Args:
        model: Any of Anomalib's.
        device: ``auto`` for CUDA where there is some, or what PyTorch calls it.

    Raises:
        ValueError: If there is no such device.
    """

    def __init__(self, model: AnomalibModule, device: str = "auto") -> None:
        self.device = torch_device(device)
        self.model = model.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Outputs:
        """Run the model."""
        result = detailed(self.model, torch.from_numpy(images).to(self.device))
        outputs = {**result.batch._asdict(), "raw_score": raw_score(result.raw), "raw_map": result.raw.anomaly_map}
        outputs |= branch_outputs(result.branches)
        return {name: value.cpu().numpy() for name, value in outputs.items() if value is not None}


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime, with as many threads as PyTorch has.

    Args:
        file: The file.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for CUDA where ONNX Runtime has it.

    Raises:
        ModuleNotFoundError: If ONNX Runtime is not installed.
        ValueError: If it does not have the device.
    """

    def __init__(self, file: Path, device: str = "auto") -> None:
        check_installed(["onnxruntime"], f"Running {file.name}")
        onnxruntime = import_module("onnxruntime")  # an extra
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = _providers(device, onnxruntime.get_available_providers())
        self._session = onnxruntime.InferenceSession(file, options, providers=providers)
        self.outputs = [output.name for output in self._session.get_outputs()]
        source = self._session.get_inputs()[0]
        self._source = source.name
        self.batch_size, self.image_size = _fixed([side if isinstance(side, int) else None for side in source.shape])

    def __call__(self, images: np.ndarray) -> Outputs:
        """Run the graph."""
        return dict(zip(self.outputs, self._session.run(None, {self._source: images}), strict=True))


class OpenVinoRuntime(Runtime):
    """An OpenVINO file with as many threads as PyTorch has; what is not INT8 in float32, not in bfloat16.

    Args:
        file: The ``.xml``, with the ``.bin`` beside it.
        device: OpenVINO's, e.g. ``cpu``, ``gpu`` or ``npu``; ``auto`` is the CPU, with the engine's numbers.

    Raises:
        ModuleNotFoundError: If OpenVINO is not installed.
        ValueError: If it does not have the device.
    """

    def __init__(self, file: Path, device: str = "auto") -> None:
        check_installed(["openvino"], f"Running {file.name}")
        core = import_module("openvino").Core()  # an extra
        name = "CPU" if device == "auto" else device.upper()
        if name.partition(".")[0] not in {each.partition(".")[0] for each in core.available_devices}:
            msg = f"device {device!r} is not one of OpenVINO here: {', '.join(core.available_devices).lower()}."
            raise ValueError(msg)
        options = IN_FLOAT32 | ({"INFERENCE_NUM_THREADS": torch.get_num_threads()} if name == "CPU" else {})
        self._graph = core.compile_model(file, name, options)
        self.outputs = [output.any_name for output in self._graph.outputs]
        shape = self._graph.input(0).partial_shape
        self.batch_size, self.image_size = _fixed([side.get_length() if side.is_static else None for side in shape])

    def __call__(self, images: np.ndarray) -> Outputs:
        """Run the graph."""
        return {output.any_name: value for output, value in self._graph(images).items()}


def load_torch_file(file: Path) -> AnomalibModule:
    """Load a Torch export, under the condition of Anomalib's ``TorchInferencer``.

    Raises:
        ValueError: If the environment does not say ``TRUST_REMOTE_CODE=1``, or there is no model in the file.
    """
    if os.environ.get("TRUST_REMOTE_CODE", "0").lower() not in {"1", "true"}:
        msg = (
            f"{file} is a pickled model, which can run any code when it is loaded. If you trust its source, set "
            "the environment variable TRUST_REMOTE_CODE=1, as for Anomalib's TorchInferencer."
        )
        raise ValueError(msg)
    content = torch.load(file, map_location="cpu", weights_only=False)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, AnomalibModule):
        msg = f"{file} holds no model of Anomalib's: it is none of its Torch exports."
        raise ValueError(msg)  # noqa: TRY004  # wrong content, not a wrong argument
    return model


def torch_device(name: str) -> torch.device:
    """A device of PyTorch's.

    Raises:
        ValueError: If it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        msg = f"device {name!r} is not there for PyTorch: {str(error).splitlines()[0]}"
        raise ValueError(msg) from error
    return device


def _providers(device: str, available: Sequence[str]) -> list[Any]:
    kind, _, index = device.partition(":")
    has_cuda = "CUDAExecutionProvider" in available
    if kind == "cpu" or (kind == "auto" and not has_cuda):
        return ["CPUExecutionProvider"]
    if kind in {"auto", "cuda"} and has_cuda:
        return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]
    msg = f"device {device!r} is not one of ONNX Runtime here: cpu{', cuda' if has_cuda else ''}."
    raise ValueError(msg)


def _fixed(shape: Sequence[int | None]) -> tuple[int | None, tuple[int, int] | None]:
    batch, _, height, width = shape
    return batch, None if height is None or width is None else (height, width)
