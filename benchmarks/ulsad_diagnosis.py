r"""What limits Ulsad on small data: image AUROC of each of its maps after so many steps, and of nearest neighbours.

    python benchmarks/ulsad_diagnosis.py SyntheticLoco tray --render_seeds 0 1 --seeds 0 1 2 --steps 420 1800
    python benchmarks/ulsad_diagnosis.py MVTecAD magnetic_tile --root path/to/mvtec_ad --steps 420 1800
    python benchmarks/ulsad_diagnosis.py SyntheticLoco tray --render_seeds 0 1 --ceilings
    python benchmarks/ulsad_diagnosis.py SyntheticLoco tray --render_seeds 0 --steps 420 --engine

Networks, loss and optimiser are those of the demo's Ulsad. The frozen backbone runs once over the images, then a plain
loop trains on its features; a run at a constant rate passes all numbers of steps. Quantiles come from normal validation
images, and nothing is selected on test images. Every measurement is a line of JSON in ``--results`` as soon as it is
made; what is there is not measured again, so that a list of runs that was stopped goes on.

``--ceilings`` trains nothing: exact nearest neighbours of the same features among 20 000 training patches. ``--engine``
trains with Anomalib's engine, then again in the loop, from the same weights on the same batches, and compares.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anomalib.data
import torch
from anomalib.data import AnomalibDataset
from anomalib.data.datamodules.base import AnomalibDataModule
from anomalib.engine import Engine
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc

from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.callbacks import SeedEverything
from anomalib_pack.neighbors import NearestNeighbors
from anomalib_pack.quantiles import quantiles
from anomalib_pack.statistics import channel_sums, mean_and_std
from anomalib_ulsad import Ulsad
from anomalib_ulsad.anomaly_map import smooth_map
from anomalib_ulsad.torch_model import BranchMaps, aggregate_features, combine

BACKBONE = "tf_efficientnet_lite0"
LAYERS = ["blocks.2", "blocks.4"]  # strides 8 and 16
CHANNELS = 152  # of both layers together
NORMAL = "good"
CHUNK = 10  # images at a time where nothing is trained
PATCHES = 20_000
MAPS = ("structural map", "logical map", "combination")


class Images(NamedTuple):
    """Images of a split with the frozen features of all channels, and the folder that each was in."""

    images: torch.Tensor  # (n, 3, 256, 256)
    features: torch.Tensor  # (n, 152, 32, 32)
    folders: list[str]
    paths: list[str]


class Data(NamedTuple):
    """A category: normal images to train on and to validate with, and test images."""

    train: Images
    validation: Images
    test: Images


class CachedBackbone(nn.Module):
    """Stands in for the frozen backbone: gives features that were computed before."""

    def __init__(self, strides: list[int]) -> None:
        super().__init__()
        self.strides = strides
        self.features = torch.empty(0)

    def forward(self, _images: torch.Tensor) -> list[torch.Tensor]:
        """Give the features that were set last."""
        return [self.features]


class Record(Callback):
    """Keeps the first weights of a training, and the images and the loss of every step."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.paths: list[list[str]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, _trainer: Trainer, pl_module: LightningModule, batch: Any, _index: int) -> None:
        """Keep the images, and before the first step the weights."""
        if not self.paths:
            self.weights = {name: tensor.clone() for name, tensor in pl_module.model.state_dict().items()}
        self.paths.append(list(batch.image_path))

    def on_train_batch_end(self, _trainer: Trainer, _module: LightningModule, outputs: Any, *_batch: Any) -> None:
        """Keep the loss."""
        self.losses.append(float(outputs["loss"]))


def main() -> None:
    """Measure what is asked for and print it with all else that the file of results holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["SyntheticLoco", "MVTecAD"])
    parser.add_argument("category")
    parser.add_argument("--root", type=Path, default=Path("datasets"), help="folder of the data set")
    parser.add_argument("--render_seeds", type=int, nargs="+", default=[0], help="of SyntheticLoco")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training")
    parser.add_argument("--steps", type=int, nargs="+", default=[420, 1800, 6000])
    parser.add_argument("--feature_dim", type=int, nargs="+", default=[64])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--ceilings", action="store_true", help="nearest neighbours instead of a training")
    parser.add_argument("--engine", action="store_true", help="compare Anomalib's engine with the loop")
    parser.add_argument("--results", type=Path, default=Path("results/ulsad_diagnosis.jsonl"))
    arguments = parser.parse_args()

    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for render_seed in arguments.render_seeds if arguments.dataset == "SyntheticLoco" else [None]:
        datamodule = load_datamodule(arguments, render_seed)
        data = Data(*map(read, (datamodule.train_data, datamodule.val_data, datamodule.test_data)))
        source = {"data": arguments.category} | ({} if render_seed is None else {"render_seed": render_seed})
        for settings in all_settings(arguments):
            if arguments.ceilings:
                add_ceilings(arguments.results, source, data, settings)
            elif arguments.engine:
                compare_with_engine(data, datamodule, settings, max(arguments.steps))
            else:
                add_training(arguments.results, source, data, settings, arguments.steps)
    print_table([line for line in read_lines(arguments.results) if line["data"] == arguments.category])


def all_settings(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield all combinations of the settings asked for, the seeds last: every setting is measured once first."""
    for seed, feature_dim, lr, batch in itertools.product(
        arguments.seeds, arguments.feature_dim, arguments.lr, arguments.batch
    ):
        yield {"feature_dim": feature_dim, "lr": lr, "batch": batch, "seed": seed}


# Data


def load_datamodule(arguments: argparse.Namespace, render_seed: int | None) -> AnomalibDataModule:
    """Build the datamodule of the demo, or one that gives a fifth of the training images to validation."""
    settings: dict[str, Any] = {
        "category": arguments.category,
        "num_workers": 0,
        "train_batch_size": arguments.batch[0],
    }
    if render_seed is None:
        settings |= {"root": arguments.root, "val_split_mode": "from_train", "val_split_ratio": 0.2, "seed": 0}
    else:
        settings |= {"root": arguments.root / f"SyntheticLoco-{render_seed}", "render_seed": render_seed}
    datamodule = getattr(anomalib.data, arguments.dataset)(**settings)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


@torch.no_grad()
def read(dataset: AnomalibDataset) -> Images:
    """Read a split, resize its images as Ulsad does and extract the features."""
    transform = Ulsad.configure_pre_processor().transform
    items = [dataset[index] for index in range(len(dataset))]
    images = torch.stack([transform(item.image) for item in items])
    backbone = FrozenBackbone(BACKBONE, LAYERS, "wheel")
    features = torch.cat([aggregate_features(backbone(chunk), CHANNELS) for chunk in images.split(CHUNK)])
    paths = [item.image_path for item in items]
    return Images(images, features, [Path(path).parent.name for path in paths], paths)


# Training


def add_training(path: Path, source: dict[str, Any], data: Data, settings: dict[str, Any], steps: list[int]) -> None:
    """Train once and append what is measured after each number of steps."""
    keys = {number: source | settings | {"steps": number} for number in sorted(steps)}
    missing = [number for number, key in keys.items() if not holds(path, key)]
    if not missing:
        return
    module = build(data, settings)
    module.model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    batches = random_batches(len(data.train.images), settings["batch"])
    for step, _ in enumerate(train(module, data.train, batches), start=1):
        if step in missing:
            append(path, keys[step] | {"auroc": aurocs(scores(module, data), data.test.folders)})
        if step == missing[-1]:
            return


def build(data: Data, settings: dict[str, Any]) -> Ulsad:
    """Build the demo's model, seeded as the demo is, with the channel statistics of the training images."""
    seed_everything(settings["seed"], workers=True)
    module = untrained(settings)
    cache_features(module)
    features = aggregate_features([data.train.features], settings["feature_dim"])
    mean, std = mean_and_std(channel_sums(features))
    module.model.feature_mean.copy_(mean)
    module.model.feature_std.copy_(std)
    seed_everything(settings["seed"], workers=True)
    return module


def untrained(settings: dict[str, Any]) -> Ulsad:
    """Build the demo's model with random networks."""
    return Ulsad(
        backbone=BACKBONE,
        layers=LAYERS,
        weights="wheel",
        feature_dim=settings["feature_dim"],
        final_activation=False,
        lr=settings["lr"],
    )


def cache_features(module: Ulsad) -> None:
    """Let the model take its features from a cache."""
    module.model.backbone = CachedBackbone(module.model.backbone.strides)


def random_batches(count: int, size: int) -> Iterator[torch.Tensor]:
    """Yield the images of each step: in a new order in each epoch, without a last batch of a single one."""
    while True:
        yield from (batch for batch in torch.randperm(count).split(size) if len(batch) > 1)


def train(module: Ulsad, images: Images, batches: Iterator[torch.Tensor]) -> Iterator[float]:
    """Train, and yield the loss of each step."""
    optimizer = module.configure_optimizers()
    for batch in batches:
        module.model.train()
        module.model.backbone.features = images.features[batch]
        loss = sum(module.loss(module.model.branches(images.images[batch])).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


# Evaluation


@torch.no_grad()
def scores(module: Ulsad, data: Data) -> dict[str, torch.Tensor]:
    """Score the test images by each map and by both, normalised by quantiles of the validation images."""
    model = module.model.eval()
    normal = join(model.raw_maps(images) for images in chunks(module, data.validation))
    model.structural_quantiles.copy_(quantiles(normal.structural, module.probabilities))
    model.logical_quantiles.copy_(quantiles(normal.logical, module.probabilities))
    maps = join(model.maps(images) for images in chunks(module, data.test))
    return {
        "structural map": maps.structural.amax(dim=(1, 2, 3)),
        "logical map": maps.logical.amax(dim=(1, 2, 3)),
        "combination": combine(maps).pred_score,
    }


def chunks(module: Ulsad, images: Images) -> Iterator[torch.Tensor]:
    """Yield a few images at a time, with their features in the cache."""
    for chunk, features in zip(images.images.split(CHUNK), images.features.split(CHUNK), strict=True):
        module.model.backbone.features = features
        yield chunk


def join(maps: Iterator[BranchMaps]) -> BranchMaps:
    """Join the maps of chunks."""
    return BranchMaps(*(torch.cat(rows) for rows in zip(*(each[:2] for each in maps), strict=True)))


def aurocs(columns: dict[str, torch.Tensor], folders: list[str]) -> dict[str, dict[str, float]]:
    """Image AUROC in per cent of each column of scores for each folder of anomalous images."""
    return {
        name: {folder: auroc(values, folders, folder) for folder in sorted({*folders} - {NORMAL})}
        for name, values in columns.items()
    }


def auroc(values: torch.Tensor, folders: list[str], anomalous: str) -> float:
    """Image AUROC in per cent of scores for one folder of anomalous images against the normal ones."""
    chosen = [index for index, folder in enumerate(folders) if folder in (NORMAL, anomalous)]
    labels = torch.tensor([folders[index] == anomalous for index in chosen])
    ranks = values.argsort().argsort() / len(values)  # binary_auroc squashes scores outside [0, 1]
    return round(100 * binary_auroc(ranks[chosen], labels.int()).item(), 1)


# Ceilings


@torch.no_grad()
def add_ceilings(path: Path, source: dict[str, Any], data: Data, settings: dict[str, Any]) -> None:
    """Append what exact nearest neighbours reach, with the channels of the model and with all, and with pooling."""
    for channels, pooled in itertools.product((settings["feature_dim"], CHANNELS), (False, True)):
        neighbours = f"{channels} channels, 3x3 pooling" if pooled else f"{channels} channels"
        key = source | {"neighbours": neighbours, "seed": settings["seed"]}
        if not holds(path, key):
            train_features, test_features = (
                patch_features(images.features, data.train.features, channels, pooled)
                for images in (data.train, data.test)
            )
            distances = nearest_distances(train_features, test_features, settings["seed"])
            values = smooth_map(distances, data.test.images.shape[-2:]).amax(dim=(1, 2, 3))
            append(path, key | {"auroc": aurocs({"structural map": values}, data.test.folders)})


def patch_features(features: torch.Tensor, train: torch.Tensor, channels: int, pooled: bool) -> torch.Tensor:
    """Features (n, channels, h, w) with the statistics of the training set, averaged over 3 x 3 locations if asked."""
    mean, std = mean_and_std(channel_sums(aggregate_features([train], channels)))
    normalised = (aggregate_features([features], channels) - mean) / std
    return F.avg_pool2d(normalised, 3, stride=1, padding=1, count_include_pad=False) if pooled else normalised


def nearest_distances(train: torch.Tensor, test: torch.Tensor, seed: int) -> torch.Tensor:
    """Distance of each location of test features to the nearest of some patches of training features, (n, h, w)."""
    patches = train.permute(0, 2, 3, 1).flatten(0, 2)  # (n, C, h, w) -> (n h w, C)
    chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:PATCHES]
    neighbors = NearestNeighbors("torch")
    neighbors.bank = patches[chosen]
    distances, _ = neighbors(test.permute(0, 2, 3, 1).flatten(0, 2))
    return distances.view(len(test), *test.shape[-2:])


# The engine


def compare_with_engine(data: Data, datamodule: AnomalibDataModule, settings: dict[str, Any], steps: int) -> None:
    """Train with Anomalib's engine as the demo does, then in the loop on the same batches from the same weights."""
    seed_everything(settings["seed"], workers=True)
    module = untrained(settings)
    record = Record()
    seeding = SeedEverything(settings["seed"])
    engine = Engine(
        callbacks=[seeding, record],
        max_steps=steps,
        check_val_every_n_epoch=1000,  # Ulsad itself validates after the last step
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir="results/ulsad_diagnosis",
    )
    engine.fit(module, datamodule=datamodule)
    cache_features(module)
    report("engine", steps, record.losses, aurocs(scores(module, data), data.test.folders))

    loop = untrained(settings)
    loop.model.load_state_dict(record.weights)
    cache_features(loop)
    place = {path: index for index, path in enumerate(data.train.paths)}
    batches = (torch.tensor([place[path] for path in paths]) for paths in record.paths)
    losses = list(train(loop, data.train, batches))
    report("loop", steps, losses, aurocs(scores(loop, data), data.test.folders))
    differences = [abs(ours - theirs) / theirs for ours, theirs in zip(losses, record.losses, strict=True)]
    for count in (1, 10, 100, steps):
        print(f"largest relative difference of the losses of the first {count} steps: {max(differences[:count]):.1e}")


def report(name: str, steps: int, losses: list[float], result: dict[str, dict[str, float]]) -> None:
    """Print what a training has come to."""
    print(f"{name}: {steps} steps, mean loss of the last 30 {statistics.mean(losses[-30:]):.5f}, {result}")


# Results


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON."""
    print(line, flush=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of JSON that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def holds(path: Path, key: dict[str, Any]) -> bool:
    """Tell whether something is measured already."""
    return any({name: line.get(name) for name in key} == key for line in read_lines(path))


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print a Markdown table with a row for each setting: mean over the training seeds and their standard deviation."""
    settings: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]] = {}
    for line in lines:
        key = tuple((name, value) for name, value in line.items() if name not in ("data", "seed", "auroc"))
        settings.setdefault(key, []).append(line["auroc"])
    for line in lines[:1]:
        print(f"\n{line['data']}, image AUROC: {' / '.join(line['auroc']['structural map'])}\n")
        print(f"| setting | seeds | {' | '.join(MAPS)} |\n|{'---|' * (2 + len(MAPS))}")
    for key, results in sorted(settings.items()):
        setting = ", ".join(f"{name} {value}" for name, value in key)
        print(f"| {setting} | {len(results)} | {' | '.join(cell(results, name) for name in MAPS)} |")


def cell(results: list[dict[str, dict[str, float]]], name: str) -> str:
    """Mean and standard deviation of one map's AUROC for each folder."""
    columns = zip(*(result[name].values() for result in results if name in result), strict=True)
    return " / ".join(
        f"{statistics.mean(column):.1f}" + (f" ± {statistics.stdev(column):.1f}" if len(column) > 1 else "")
        for column in columns
    )


if __name__ == "__main__":
    main()
