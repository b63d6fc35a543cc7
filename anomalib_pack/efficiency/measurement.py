"""All that is measured on one model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from anomalib_pack.efficiency.complexity import flops, learnable_count, parameter_count, profiler_flops
from anomalib_pack.efficiency.environment import environment
from anomalib_pack.efficiency.inspection import inspection
from anomalib_pack.efficiency.memory import bank_size, peak_mib, reset_peak
from anomalib_pack.efficiency.models import build
from anomalib_pack.efficiency.settings import Entry, Settings
from anomalib_pack.efficiency.timing import inference, latency, networks_alone, pass_times, throughput
from anomalib_pack.process import in_own_process

PASSES = {"prediction": inference, "networks": networks_alone}  # by protocol


def or_error(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Call a function that returns a row; if it fails, return the `error` in one line and its `traceback` instead."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever is wrong with one model, the others are measured
        message = str(error) or str(error.__cause__)  # Anomalib's error for an unknown model is empty
        return {"error": f"{type(error).__name__}: {' '.join(message.split())}", "traceback": traceback.format_exc()}


def apart(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """As :func:`or_error` in a process of its own, which may also be killed, e.g. for want of memory."""
    try:
        return in_own_process(or_error, function, *arguments)
    except RuntimeError as error:
        return {"error": str(error), "traceback": ""}


def measure(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Measure a model in this process.

    The network is measured as `predict` runs it, without the pre-processor before and the post-processor behind it:
    from the image tensor of its input size to the anomaly map, or, by protocol, to what the map is computed from.

    Returns:
        A row of the results; its keys are the columns that docs/efficiency.md explains.

    Raises:
        ValueError: If the size of the model's images is unknown, or the protocol is not for models with a memory bank.
    """
    device = torch.device(settings.device)
    model, bank = build(entry, settings.device)
    if bank and settings.protocol == "networks":
        msg = f"{entry.name} has a memory bank, and in training keeps the features of each pass: not by `networks`."
        raise ValueError(msg)
    size = entry.image_size or model.input_size
    if size is None:
        msg = f"the pre-processor of {entry.name} does not resize images: give an image_size."
        raise ValueError(msg)
    dtype = getattr(torch, entry.precision)
    network = model.model.eval().to(device, dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def images(batch_size: int) -> torch.Tensor:
        return torch.rand(batch_size, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)

    def times(batch_size: int) -> np.ndarray:
        one_pass = PASSES[settings.protocol](network, images(batch_size), device)
        runs = [
            pass_times(
                one_pass,
                device,
                warmup=settings.warmup,
                passes=settings.passes,
                label=f"{entry.name}, batch {batch_size}, run {run} of {settings.runs}",
            )
            for run in range(1, settings.runs + 1)
        ]
        return np.stack(runs)

    @torch.inference_mode()  # as Anomalib predicts; the model is built outside, where tensors have versions
    def of_batches(batch_size: int) -> dict[str, Any]:
        reset_peak(device)
        measured = times(batch_size)
        memory = peak_mib(device)
        row: dict[str, Any] = {}
        if batch_size == 1:
            row |= {**latency(measured), "peak_memory_mib": memory}
        if batch_size in settings.batch_sizes:
            mean, std = throughput(measured, batch_size)
            row |= {
                f"throughput_{batch_size}": mean,
                f"throughput_std_{batch_size}": std,
                f"peak_memory_mib_{batch_size}": memory,
            }
        return row

    row = of_batches(1)
    # The larger batches leave memory behind, which the inspector's passes would not have to ask the system for.
    if settings.protocol == "prediction" and entry.precision == "float32":  # an inspector's
        row |= inspection(model, tuple(size), settings.device, settings, entry.name)
    for batch_size in sorted({*settings.batch_sizes} - {1}):  # memory that a larger one leaves behind counts for none
        row |= of_batches(batch_size)
    with torch.inference_mode():
        row["flops"] = flops(network, images(1).to(device))
        row["flops_profiler"] = profiler_flops(network, images(1).to(device))
    return {
        "image_size": f"{size[0]} x {size[1]}",
        "precision": entry.precision,
        "protocol": settings.protocol,
        "warmup": settings.warmup,
        "passes": settings.passes,
        "runs": settings.runs,
        **row,
        "parameters": parameter_count(network),
        "learnable_parameters": learnable_count(network),
        **bank_size(network, bank),
        **environment(device),
    }
