"""Timed passes: latency and throughput (EfficientAD supplement, Sec. 5; MiniMaxAD, Table 6)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from anomalib.data import InferenceBatch
from torch import nn

from anomalib_pack.progress import progress_bar


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


def networks_alone(network: nn.Module, images: torch.Tensor, device: torch.device) -> Callable[[], object]:
    """Make a pass without copies and without maps: from images on the device to what the network gives to its loss.

    Args:
        network: On the device, in eval mode. Asked for training, it returns what its loss takes; its layers stay in
            eval mode.
        images: (B, 3, H, W).
        device: The network's.

    Returns:
        A function without arguments. It returns what the network returns.

    Raises:
        ValueError: If the network returns a finished prediction, or cannot do without more than the images.
    """
    images = images.to(device)

    def one_pass() -> object:
        network.training = True  # this flag alone: not that of the layers
        try:
            return network(images)
        finally:
            network.training = False

    try:
        finished = isinstance(one_pass(), InferenceBatch)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        msg = f"the networks do not run alone, without anomaly maps: {error}"
        raise ValueError(msg) from error
    if finished:
        msg = "the networks do not run alone: what they return in training has anomaly maps too."
        raise ValueError(msg)
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
    times = [seconds(one_pass) for _ in progress_bar(range(warmup + passes), desc=label, leave=False)]
    return np.array(times[warmup:])


def latency(times: np.ndarray) -> dict[str, float | None]:
    """Latency in milliseconds of R runs of N passes, (R, N) in seconds.

    Returns:
        Mean and standard deviation of the runs' means, median and 95th percentile of all passes.

    Example:
        >>> latency(np.array([[0.001, 0.002, 0.006], [0.003, 0.004, 0.005]]))["latency_mean_ms"]
        3.5
    """
    mean, std = mean_and_std(1000 * times.mean(axis=1), digits=4)
    return {
        "latency_mean_ms": mean,
        "latency_std_ms": std,
        "latency_median_ms": round(1000 * float(np.median(times)), 4),
        "latency_p95_ms": round(1000 * float(np.percentile(times, 95)), 4),
    }


def throughput(times: np.ndarray, batch_size: int) -> tuple[float, float | None]:
    """Images per second of R runs: N passes times the batch size, by the sum of their seconds (R, N).

    Returns:
        Mean and standard deviation over the runs.

    Example:
        >>> throughput(np.array([[0.5, 1.5], [1.0, 3.0]]), batch_size=16)
        (12.0, 5.657)
    """
    return mean_and_std(times.shape[1] * batch_size / times.sum(axis=1), digits=3)


def mean_and_std(runs: np.ndarray, digits: int) -> tuple[float, float | None]:
    """Mean and sample standard deviation of a number of each run (R,); a single run has no deviation."""
    return round(float(runs.mean()), digits), round(float(runs.std(ddof=1)), digits) if len(runs) > 1 else None


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
