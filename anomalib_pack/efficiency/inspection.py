"""Latency of a whole inspection: from a frame of a camera to score, label, map, mask and defects at its size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models import AnomalibModule

from anomalib_pack.efficiency.settings import Settings
from anomalib_pack.efficiency.timing import mean_and_std, pass_times
from anomalib_pack.inspector import Inspector

logger = logging.getLogger(__name__)


def inspection(
    source: AnomalibModule | Path, size: tuple[int, int], device: str, settings: Settings, label: str
) -> dict[str, Any]:
    """Measure an inspector with frames of 8 bits, one at a time.

    Args:
        source: The model, or its file.
        size: Height and width of the frames.
        device: The inspector's.
        settings: Of the run.
        label: Of the progress bar.

    Returns:
        The column ``inspector_mean_ms``: None for a model that cannot be inspected, whose network is measured all the
        same.
    """
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    try:
        inspector = Inspector(source, device=device)
        runs = [
            pass_times(
                lambda: inspector.predict(frame),
                torch.device(device),
                warmup=settings.warmup,
                passes=settings.passes,
                label=f"{label}, frames",
            )
            for _ in range(settings.runs)
        ]
    except Exception as error:  # a model of others may give anything
        logger.warning("%s cannot be inspected: %s: %s", label, type(error).__name__, error)
        return {"inspector_mean_ms": None}
    mean, _ = mean_and_std(1000 * np.stack(runs).mean(axis=1), digits=4)
    return {"inspector_mean_ms": mean}
