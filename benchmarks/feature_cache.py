r"""Seconds per epoch from the second one on, with frozen features computed once and with features of every epoch.

    python benchmarks/feature_cache.py
    python benchmarks/feature_cache.py --models Uniad --root path/to/mvtec_ad --categories hazelnut transistor

Ulsad as in the demo, on rendered trays; Uniad as in its paper, with efficientnet_b4, and MiniMaxAd as in its paper, on
categories in MVTec AD's layout, which are rendered trays without ``--root``. Weights are random: they cost no time.
Trainings with and without a cache take turns in one process. Of those without, the shares of the frozen network and of
reading (decoding, resizing) are measured: removing both could make an epoch 1 / (1 - shares) times as fast, the limit.
The last column is how much of that is reached. On a machine that others use, ``--clock cpu`` counts the processor's
time instead; it needs one thread (``OMP_NUM_THREADS=1``).

The second table is arithmetic for a GPU that is busy with the networks: their floating-point operations in a step, and
the images in a second at which reading by 8 workers becomes the limit, which the cache removes.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.flop_counter import FlopCounterMode

from anomalib_minimaxad import MiniMaxAd
from anomalib_pack.data import MultiCategory, SyntheticLoco
from anomalib_pack.feature_cache import FeatureCache
from anomalib_ulsad import Ulsad
from anomalib_uniad import Uniad

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
BATCH = {"Ulsad": 4, "Uniad": 8, "MiniMaxAd": 8}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WORKERS = 8  # Anomalib's default
READING = ("train_dataloader_next", "PreProcessor{}.on_train_batch_start")


class Clock(Profiler):
    """Seconds of what Lightning does, by the end of its name."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self.now = now
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def start(self, action_name: str) -> None:
        """Start an action."""
        self.seconds[action_name] -= self.now()

    def stop(self, action_name: str) -> None:
        """End it."""
        self.seconds[action_name] += self.now()

    def reading(self) -> float:
        """Seconds of reading so far."""
        return sum(seconds for action, seconds in self.seconds.items() if action.endswith(READING))


class TimedCache(FeatureCache):
    """A cache that keeps what the frozen network takes."""

    def __init__(self, cache: str | None, now: Callable[[], float]) -> None:
        super().__init__(cache)
        self.now, self.seconds = now, 0.0

    def __call__(
        self, batch: ImageBatch, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> Sequence[torch.Tensor]:
        """Give the tensors of a batch."""

        def timed(images: torch.Tensor) -> Sequence[torch.Tensor]:
            start = self.now()
            tensors = compute(images)
            self.seconds += self.now() - start
            return tensors

        return super().__call__(batch, timed)


class Epochs(Callback):
    """Seconds of the epochs from the second one on: all, of the frozen network and of reading."""

    def __init__(self, clock: Clock, cache: TimedCache) -> None:
        self.clock, self.cache = clock, cache
        self.seconds: list[tuple[float, ...]] = []

    def _read(self) -> tuple[float, ...]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock.now(), self.cache.seconds, self.clock.reading()

    def on_train_epoch_start(self, _trainer: Trainer, _module: LightningModule) -> None:
        """Start an epoch."""
        self._start = self._read()

    def on_train_epoch_end(self, trainer: Trainer, _module: LightningModule) -> None:
        """End it."""
        if trainer.current_epoch > 0:
            self.seconds.append(tuple(end - start for end, start in zip(self._read(), self._start, strict=True)))


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--root", type=Path, help="folder of the categories")
    parser.add_argument("--categories", nargs="+", default=["hazelnut", "magnetic_tile", "transistor"])
    parser.add_argument("--images", type=int, help="so many training images, of all categories alike; default: all")
    parser.add_argument("--epochs", type=int, default=4, help="of each training; the first and the last do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    print(
        "| model, batch, images | epoch without | with | times | frozen network | reading | the limit | reached |\n"
        "|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    arithmetic = [measure(name, arguments) for name in arguments.models]
    print("\n| model | frozen, TFLOP a step | trained | the limit on a GPU | images in a second that 8 workers read |")
    print("|---|---|---|---|---|", *arithmetic, sep="\n")


def measure(name: str, arguments: argparse.Namespace) -> str:
    """Print a model's row of the first table, and return that of the second."""
    epochs: dict[str | None, list[tuple[float, ...]]] = {None: [], "ram": []}
    for _ in range(arguments.rounds):
        for cache, seconds in epochs.items():
            model, images = train(name, cache, arguments, seconds)
    with_cache = median(epoch[0] for epoch in epochs["ram"])
    whole, frozen, reading = (median(column) for column in zip(*epochs[None], strict=True))
    limit = whole / (whole - frozen - reading)
    print(
        f"| {name}, {BATCH[name]}, {images} | {whole:.2f} s | {with_cache:.2f} s | {whole / with_cache:.2f} | "
        f"{100 * frozen / whole:.0f} % | {100 * reading / whole:.0f} % | {limit:.2f} | "
        f"{whole / with_cache / limit:.2f} |",
        flush=True,
    )
    computed, learned = operations(model, BATCH[name])
    return (
        f"| {name} | {computed:.3f} | {learned:.3f} | {(computed + learned) / learned:.2f} | "
        f"{WORKERS * images / reading:.0f} |"
    )


def train(
    name: str, cache: str | None, arguments: argparse.Namespace, seconds: list[tuple[float, ...]]
) -> tuple[AnomalibModule, int]:
    """Train once and append the seconds of the epochs; return the model and the number of images."""
    seed_everything(0, workers=True)
    model = build(name)
    model.feature_cache = TimedCache(cache, CLOCKS[arguments.clock])
    clock = Clock(CLOCKS[arguments.clock])
    epochs = Epochs(clock, model.feature_cache)
    data = build_data(name, arguments)
    with TemporaryDirectory() as folder:
        Engine(
            callbacks=[epochs],
            profiler=clock,
            max_epochs=arguments.epochs,
            check_val_every_n_epoch=arguments.epochs + 1,
            limit_val_batches=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(model, datamodule=data)
    # The last epoch has a validation in it, which is the same in both.
    seconds += epochs.seconds[:-1]
    return model, len(data.train_data)


def build(name: str) -> AnomalibModule:
    """Build a model with random weights."""
    if name == "Ulsad":
        arguments = yaml.safe_load(DEMO.read_text())["model"]["init_args"]
        return Ulsad(**arguments | {"weights": None, "post_processor": True})
    return {"Uniad": Uniad, "MiniMaxAd": MiniMaxAd}[name](weights=None)


def build_data(name: str, arguments: argparse.Namespace) -> AnomalibDataModule:
    """Build and set up the data, with as many images as are asked for."""
    settings: dict[str, Any] = {"train_batch_size": BATCH[name], "num_workers": 0}
    if name == "Ulsad" or arguments.root is None:
        data = SyntheticLoco(category="tray", **settings)
    else:
        data = MultiCategory(
            "MVTecAD", arguments.root, arguments.categories, val_split_mode="from_train", seed=0, **settings
        )
    data.prepare_data()
    data.setup(TrainerFn.FITTING)
    count = len(data.train_data)
    chosen = [index * count // arguments.images for index in range(arguments.images)] if arguments.images else []
    if chosen:
        data.train_data.subsample(chosen, inplace=True)
    return data


def operations(model: AnomalibModule, batch: int) -> tuple[float, float]:
    """TFLOP of a training step: of the frozen network, and of all else forwards and backwards."""
    images = torch.rand(batch, 3, *model.input_size)
    stand_in = type("Batch", (), {"image": images, "image_path": None, "__len__": lambda _self: batch})()
    model.feature_cache = OnlyFrozen()
    model.cpu().train()
    model.log = lambda *_arguments, **_options: None
    with FlopCounterMode(display=False) as counter:
        loss = model.training_step(stand_in, 0)["loss"]
        loss.backward()
    frozen = model.feature_cache.flops
    return frozen / 1e12, (counter.get_total_flops() - frozen) / 1e12


class OnlyFrozen(FeatureCache):
    """Counts the operations of the frozen network."""

    flops = 0

    def __call__(
        self, batch: ImageBatch, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> Sequence[torch.Tensor]:
        """Give the tensors of a batch."""
        with FlopCounterMode(display=False) as counter:
            tensors = compute(batch.image)
        self.flops = counter.get_total_flops()
        return tensors


if __name__ == "__main__":
    main()
