"""Time of EfficientAD's networks with Anomalib's model and with ours: a prediction and a training step.

    python benchmarks/efficientad_speed.py

Both have the same weights and give the same map and, with the same random numbers, the same losses, which is checked.
They run interleaved; times are medians: compare them by their ratio. A step, with one image, is forward, backward and
Adam. With one thread times are the process's own, so that other processes disturb them less.
"""

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

from anomalib_efficientad.torch_model import DistilledEfficientAdModel


def main() -> None:
    """Print a row for a prediction with each batch size, and one for a training step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "medium"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print("| size | | ours | Anomalib's |\n|---|---|---|---|")
    for size in map(EfficientAdModelSize, arguments.sizes):
        models = [kind(384, size) for kind in (DistilledEfficientAdModel, EfficientAdModel)]
        models[1].load_state_dict(models[0].state_dict())
        models[1].choose_random_aug_image = models[0].choose_random_aug_image  # of the same random numbers
        for model in models:
            model.eval()  # once: each time makes what is kept between passes anew
        for count in arguments.batches:
            one_pass = prediction(models, torch.rand(count, 3, 256, 256))
            report(size, f"prediction, batch of {count}", measure(one_pass, clock, arguments.repeats))
        for model in models:
            model.train()
        one_pass = training(models, *torch.rand(2, 1, 3, 256, 256))
        report(size, "training step", measure(one_pass, clock, arguments.repeats))


def report(size: EfficientAdModelSize, what: str, seconds: list[float]) -> None:
    """Print a row."""
    ours, theirs = seconds
    print(f"| {size.value} | {what} | {1000 * ours:.0f} ms | x {theirs / ours:.2f} |", flush=True)


def prediction(models: list[EfficientAdModel], images: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """A pass of either model that gives its anomaly map."""

    @torch.inference_mode()
    def one_pass(which: int) -> torch.Tensor:
        return models[which](images).anomaly_map

    return one_pass


def training(
    models: list[EfficientAdModel], images: torch.Tensor, penalty_images: torch.Tensor
) -> Callable[[int], torch.Tensor]:
    """A training step of either model that gives its losses."""
    optimizers = [torch.optim.Adam([*model.student.parameters(), *model.ae.parameters()], lr=0) for model in models]

    def one_pass(which: int) -> torch.Tensor:
        torch.manual_seed(0)
        random.seed(0)
        losses = models[which](images, penalty_images)
        optimizers[which].zero_grad()
        sum(losses).backward()
        optimizers[which].step()
        return torch.stack(losses).detach()

    return one_pass


def measure(one_pass: Callable[[int], torch.Tensor], clock: Callable[[], float], repeats: int) -> list[float]:
    """Median seconds of each model, without the first pass."""
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        results = []
        for which, record in enumerate(times):
            start = clock()
            results.append(one_pass(which))
            record.append(clock() - start)
        torch.testing.assert_close(*results, atol=1e-5 * results[1].abs().max().item(), rtol=1e-5)
    return [median(record[1:]) for record in times]


if __name__ == "__main__":
    main()
