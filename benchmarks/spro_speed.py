"""Time of AUC-sPRO: exact, beside one round of thresholds as the published evaluation of MVTec LOCO AD has it.

    OMP_NUM_THREADS=1 python benchmarks/spro_speed.py

The published evaluation (version 2.0) computes the curve at 50 thresholds: for each of them one pass compares every map
and counts per defect. Then it adds thresholds where the curve has gaps, which is not done here. The pass is rebuilt
with NumPy. Both get the same made-up maps (noise, and bumps of varied strength where defects are) in memory, of the
size of MVTec LOCO's largest images. They take turns: in each repetition, the exact one is computed three times, of
which the median counts, because it is short. Times are those of the processor, so that other processes matter less.

The area at 50 thresholds is printed too: it is not the exact one.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
from torch.nn.functional import interpolate

from anomalib_pack.defect import Defect
from anomalib_pack.metrics.spro import DEFAULT_LIMIT, LIMITS, auc_spro

NUM_THRESHOLDS = 50  # of the published evaluation's first round


def main() -> None:
    """Print the times of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12, help="number of images, of which a third is normal")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 1600), help="height and width")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    maps, defects = zip(*(made_up(index, arguments.size) for index in range(arguments.images)), strict=True)
    share = np.mean([sum(each.mask.sum().item() for each in found) for found in defects]) / maps[0].size
    print(f"{len(maps)} maps of {arguments.size[0]}x{arguments.size[1]}, {share:.1%} of the pixels in defects")

    functions = {"exact": auc_spro, "50 thresholds": at_thresholds}
    for name, function in functions.items():
        print(f"{name:>13}: AUC-sPRO at {DEFAULT_LIMIT} is {function(maps, defects)[DEFAULT_LIMIT]:.6f}")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(arguments.repetitions):
        times["exact"].append(median(seconds(auc_spro, maps, defects) for _ in range(3)))
        times["50 thresholds"].append(seconds(at_thresholds, maps, defects))
    ratios = [slow / fast for fast, slow in zip(*times.values(), strict=True)]
    for name, taken in times.items():
        print(f"{name:>13}: {median(taken):6.2f} s")
    print(f"{'ratio':>13}: {median(ratios):6.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


def seconds(function: Callable, maps: Sequence[np.ndarray], defects: Sequence[Sequence[Defect]]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    function(maps, defects)
    return time.process_time() - start


def made_up(index: int, size: Sequence[int]) -> tuple[np.ndarray, list[Defect]]:
    """A map, as a network's that is resized, and none to three defects that may overlap, half of each to be found."""
    height, width = size
    scores = interpolate(torch.randn(1, 1, 64, 64), size=tuple(size), mode="bilinear")[0, 0]
    defects = []
    for _ in range(index % 3 and 1 + index % 3):
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        top, left = torch.rand(2) * torch.tensor(size)
        radius = (0.03 + 0.07 * torch.rand(2)) * torch.tensor(size)
        mask = ((rows - top) / radius[0]) ** 2 + ((columns - left) / radius[1]) ** 2 < 1
        scores += 2.5 * torch.rand(1) * mask
        defects.append(Defect("blob", mask, max(int(mask.sum()) // 2, 1)))
    return scores.numpy(), defects


def at_thresholds(maps: Sequence[np.ndarray], defects: Sequence[Sequence[Defect]]) -> dict[float, float]:
    """AUC-sPRO of all limits at 50 thresholds that are quantiles of the scores."""
    scores = np.sort(np.concatenate([image.ravel() for image in maps]))
    thresholds = scores[np.linspace(0, len(scores) - 1, NUM_THRESHOLDS).astype(int)][::-1]
    masks = [[each.mask.numpy() for each in found] for found in defects]
    free = [~np.any([np.zeros(image.shape, bool), *found], axis=0) for image, found in zip(maps, masks, strict=True)]
    num_free = sum(each.sum() for each in free)
    rates, overlaps = [0.0], [0.0]
    for threshold in thresholds:
        false_positives, spros = 0, []
        for image, found, image_masks, is_free in zip(maps, defects, masks, free, strict=True):
            positive = image > threshold
            false_positives += np.sum(np.logical_and(positive, is_free))
            for each, mask in zip(found, image_masks, strict=True):
                spros.append(min(np.sum(np.logical_and(positive, mask)) / each.saturation_area, 1))
        rates.append(false_positives / num_free)
        overlaps.append(np.mean(spros))
    rates.append(1.0)  # the lowest score is not above itself
    overlaps.append(1.0)
    return {limit: area(np.array(rates), np.array(overlaps), limit) for limit in LIMITS}


def area(rates: np.ndarray, overlaps: np.ndarray, limit: float) -> float:
    """Trapezoids up to a limit, divided by it."""
    inside = rates <= limit
    last = np.interp(limit, rates, overlaps)
    return float(np.trapezoid([*overlaps[inside], last], [*rates[inside], limit])) / limit


if __name__ == "__main__":
    main()
