"""Forward time of Uniad against forwards that do what the published code does, interleaved in one run.

    python benchmarks/uniad_forward.py
    python benchmarks/uniad_forward.py --device cuda

Variants of the same weights: the mask rebuilt in every call with two Python loops; attention weights built instead of a
fused kernel; the networks run as they are instead of folded and packed; all of these. All give the same anomaly maps,
which is checked. The times are medians; compare them by their ratios only. With one CPU thread they are the process's
own, so that other processes disturb them less.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anomalib_pack.folding import Call, Folding, Result
from anomalib_uniad.torch_model import UniadModel

NEIGHBORS = 7  # the paper's


def main() -> None:
    """Measure all variants at batch 1 and 16, for the whole model and for the reconstruction network alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="tf_efficientnet_b4.aa_in1k")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = UniadModel(arguments.backbone, weights=None, neighbor_size=NEIGHBORS).eval().to(arguments.device)
    print("| what | batch | ours | mask rebuilt | weights built | as they are | all |\n|---|---|---|---|---|---|---|")
    for batch in (1, 16):
        images = torch.rand(batch, 3, 224, 224, device=arguments.device)
        features = model.features(images)
        for name, call in (
            ("image to map", lambda images=images: model(images).anomaly_map),
            ("reconstruction alone", lambda features=features: model.reconstruct(features).reconstruction),
        ):
            times = measure(model, call, arguments)
            ratios = " | ".join(f"x {other / times[0]:.3f}" for other in times[1:])
            print(f"| {name} | {batch} | {1000 * times[0]:.1f} ms | {ratios} |")


@torch.no_grad()
def measure(model: UniadModel, call: Callable[[], torch.Tensor], arguments: argparse.Namespace) -> list[float]:
    """Median seconds of ours, mask rebuilt, weights built, networks as they are, all of these."""
    variants = [set(), {"mask"}, {"weights"}, {"networks"}, {"mask", "weights", "networks"}]
    foldings, unfolded = (model.backbone._folding, model._folding), Unfolded()
    times: list[list[float]] = [[] for _ in variants]
    expected = call()
    torch.testing.assert_close(loop_mask(model.grid, arguments.device), model.reconstruction.mask, atol=0, rtol=0)
    for _ in range(arguments.repeats):
        for variant, record in zip(variants, times, strict=True):
            kernel: AbstractContextManager = sdpa_kernel(SDPBackend.MATH) if "weights" in variant else nullcontext()
            model.backbone._folding, model._folding = 2 * [unfolded] if "networks" in variant else foldings
            start = now(arguments.device)
            if "mask" in variant:
                loop_mask(model.grid, arguments.device)
            with kernel:
                result = call()
            record.append(now(arguments.device) - start)
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    model.backbone._folding, model._folding = foldings
    return [median(record[1:]) for record in times]  # without the warm-up


class Unfolded(Folding):
    """Runs the network as it is."""

    def run(self, network: nn.Module, images: torch.Tensor, call: Call[torch.Tensor, Result]) -> Result:
        """Run it."""
        return call(network, images)


def loop_mask(grid: tuple[int, int], device: str) -> torch.Tensor:
    """Build the mask as the published code does, one token after the other."""
    h, w = grid
    reach = NEIGHBORS // 2
    visible = torch.ones(h, w, h, w, device=device)
    for row in range(h):
        for column in range(w):
            rows = slice(max(row - reach, 0), row + reach + 1)
            columns = slice(max(column - reach, 0), column + reach + 1)
            visible[row, column, rows, columns] = 0
    visible = visible.view(h * w, h * w)
    return torch.zeros_like(visible).masked_fill(visible == 0, float("-inf"))


def now(device: str) -> float:
    """Seconds, after all work that was given to the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


if __name__ == "__main__":
    main()
