"""All that is measured on one model."""

from __future__ import annotations

import traceback
from typing import Any

import numpy as np
import torch

from anomalib_pack.efficiency.complexity import flops, parameter_count, profiler_flops
from anomalib_pack.efficiency.environment import environment
from anomalib_pack.efficiency.memory import bank_size, peak_mib, reset_peak
from anomalib_pack.efficiency.models import build
from anomalib_pack.efficiency.settings import Entry, Settings
from anomalib_pack.efficiency.timing import inference, latency, pass_times, throughput


def measure_or_error(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Measure a model; if that fails, return the `error` in one line and its `traceback` instead."""
    try:
        return measure(entry, settings)
    except Exception as error:  # whatever is wrong with one model, the others are measured
        message = str(error) or str(error.__cause__)  # Anomalib's error for an unknown model is empty
        return {"error": f"{type(error).__name__}: {' '.join(message.split())}", "traceback": traceback.format_exc()}


def measure(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Measure a model in this process.

    The network is measured as `predict` runs it, without the pre-processor before and the post-processor behind it:
    from the image tensor of its input size to the anomaly map.

    Returns:
        A row of the results; its keys are the columns that docs/efficiency.md explains.

    Raises:
        ValueError: If the size of the model's images is unknown.
    """
    device = torch.device(settings.device)
    model, bank = build(entry, settings.device)
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
        one_pass = inference(network, images(batch_size), device)
        label = f"{entry.name}, batch {batch_size}"
        return pass_times(one_pass, device, warmup=settings.warmup, passes=settings.passes, label=label)

    with torch.inference_mode():  # as Anomalib predicts; the model is built outside, where tensors have versions
        reset_peak(device)
        row = latency(times(1))
        row["peak_memory_mib"] = peak_mib(device)  # before larger batches raise it
        for batch_size in settings.batch_sizes:
            row[f"throughput_{batch_size}"] = throughput(times(batch_size), batch_size)
        row["flops"] = flops(network, images(1).to(device))
        row["flops_profiler"] = profiler_flops(network, images(1).to(device))
    return {
        "image_size": f"{size[0]} x {size[1]}",
        "precision": entry.precision,
        "warmup": settings.warmup,
        "passes": settings.passes,
        **row,
        "parameters": parameter_count(network),
        **bank_size(network, bank),
        **environment(device),
    }
