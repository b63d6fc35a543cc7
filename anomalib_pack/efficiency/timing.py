"""Timed passes: latency and throughput (EfficientAD supplement, Sec. 5)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm


def inference(network: nn.Module, images: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
    """Make a pass: from before the copy of the images to the device until the anomaly maps are on the CPU.

    Args:
        network: On the device, in eval mode; returns an ``InferenceBatch``.
        images: (B, 3, H, W) on the CPU.
        device: The network's.

    Returns:
        A function without arguments. It returns the anomaly maps, or the scores of a model that has no maps.
    """

    def one_pass() -> torch.Tensor:
        output: Any = network(images.to(device))
        result = output.pred_score if output.anomaly_map is None else output.anomaly_map
        return result.cpu()

    return one_pass


def pass_times(
    one_pass: Callable[[], object], device: torch.device, *, warmup: int, passes: int, label: str
) -> np.ndarray:
    """Run passes, the first ones untimed.

    Args:
        one_pass: Called ``warmup + passes`` times.
        device: With CUDA, events on the device take the time.
        warmup: Number of untimed passes.
        passes: Number of timed passes.
        label: Of the progress bar.

    Returns:
        Seconds of each timed pass, (passes,).
    """
    seconds = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    times = [seconds(one_pass) for _ in tqdm(range(warmup + passes), desc=label, leave=False)]
    return np.array(times[warmup:])


def latency(times: np.ndarray) -> dict[str, float]:
    """Mean, median and 95th percentile in milliseconds of passes (N,) in seconds.

    Example:
        >>> latency(np.array([0.001, 0.002, 0.006]))
        {'latency_mean_ms': 3.0, 'latency_median_ms': 2.0, 'latency_p95_ms': 5.6}
    """
    return {
        "latency_mean_ms": round(1000 * float(times.mean()), 4),
        "latency_median_ms": round(1000 * float(np.median(times)), 4),
        "latency_p95_ms": round(1000 * float(np.percentile(times, 95)), 4),
    }


def throughput(times: np.ndarray, batch_size: int) -> float:
    """Images per second: N passes times the batch size, by the sum of their seconds (N,).

    Example:
        >>> throughput(np.array([0.5, 1.5]), batch_size=16)
        16.0
    """
    return round(len(times) * batch_size / float(times.sum()), 3)


def _cpu_seconds(one_pass: Callable[[], object]) -> float:
    start = time.perf_counter()
    one_pass()
    return time.perf_counter() - start


def _cuda_seconds(one_pass: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()  # the device is idle, so the first event has the time at which the pass starts
    start.record()
    one_pass()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
