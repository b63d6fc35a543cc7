r"""Ulsad, Unislad and Anomalib's Patchcore on the same images, backbone, weights and image size, in one run.

    python benchmarks/compare_patchcore.py SyntheticLoco tray --models Patchcore Ulsad
    python benchmarks/compare_patchcore.py MVTecAD hazelnut --root path/to/mvtec_ad --models Patchcore Unislad \
        --image_size 224 --vit_weights path/to/vit_small_patch14_dinov2.safetensors --readings default literal unit raw

Training sets without a folder of validation images lose a fifth to validation. Nothing is selected on test images: the
settings below are the same for all data, all models keep their last state, and thresholds come from normal images.

Readings of Unislad's Mahalanobis transform share one pass over the training images: features and coresets come before
the transform, so each gets what a training of its own would give it. Its checkpoints are left in the results.
"""

import argparse
from pathlib import Path
from typing import Any

import anomalib.data
import timm
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Patchcore
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.metrics import GroupEvaluator
from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_ulsad import Ulsad
from anomalib_unislad import Unislad
from anomalib_unislad.components import AGGREGATIONS

BACKBONE = "tf_efficientnet_lite0"
LAYERS = ["blocks.2", "blocks.4"]  # strides 8 and 16
# As in the table of UniSLAD's authors: those at strides 4 (all, here two, of WideResNet50-2 three), 8 and 16, and the
# first at stride 32.
DEPTHS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 1}
BLOCKS = [f"blocks.{stage}.{block}" for stage, depth in DEPTHS.items() for block in range(depth)]
MODELS = ("Patchcore", "Ulsad", "Unislad")
# Readings of Eqs. 6 to 10 and 17: how Unislad treats features before it measures distances.
READINGS: dict[str, dict[str, bool]] = {
    "default": {},  # whitened
    "literal": {"unit_length": True},  # whitened, then of length 1, class tokens too
    "unit": {"whitening": False, "unit_length": True},  # of length 1
    "raw": {"whitening": False},
}
BANKS = ("local_bank", "global_bank", "class_bank")


def main() -> None:
    """Train and test the models, and print each group's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name of a datamodule, e.g. SyntheticLoco or MVTecAD")
    parser.add_argument("category")
    parser.add_argument("--root", help="folder of the data set, by default the datamodule's own")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--image_size", type=int, default=256, help="height and width")
    parser.add_argument("--epochs", type=int, default=40, help="of Ulsad; the paper trains for 200")
    parser.add_argument("--feature_dim", type=int, default=64, help="of Ulsad; the paper's is 384")
    parser.add_argument("--vit", default="vit_small_patch14_dinov2", help="of Unislad")
    parser.add_argument("--vit_layer", type=int, default=8, help="of Unislad")
    parser.add_argument("--vit_weights", default="hub", help="of Unislad")
    parser.add_argument("--readings", nargs="+", default=["default"], choices=READINGS, help="of Unislad")
    parser.add_argument("--aggregation", default="patchcore", choices=AGGREGATIONS, help="of Unislad")
    parser.add_argument("--results", type=Path, default=Path("results/compare_patchcore"))
    arguments = parser.parse_args()

    for name in arguments.models:
        seed_everything(0, workers=True)
        datamodule = load_data(arguments.dataset, arguments.category, arguments.root)
        {"Patchcore": run_patchcore, "Ulsad": run_ulsad, "Unislad": run_unislad}[name](arguments, datamodule)


def engine_for(arguments: argparse.Namespace, **trainer: Any) -> Engine:
    """Build an engine that prints nothing."""
    return Engine(default_root_dir=arguments.results, logger=False, enable_progress_bar=False, **trainer)


def parts_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments that all models share: metrics by group, no pictures."""
    groups = "folder" if arguments.dataset == "MVTecAD" else "group"
    return {"evaluator": GroupEvaluator(group_by=groups), "visualizer": False}


def run_patchcore(arguments: argparse.Namespace, datamodule: AnomalibDataModule) -> None:
    """Fit and test Patchcore."""
    model, engine = patchcore(arguments), engine_for(arguments)
    engine.fit(model, datamodule=datamodule)
    report("Patchcore", engine.test(model, datamodule=datamodule, verbose=False)[0])


def run_ulsad(arguments: argparse.Namespace, datamodule: AnomalibDataModule) -> None:
    """Train and test Ulsad."""
    length = {"max_epochs": arguments.epochs, "check_val_every_n_epoch": arguments.epochs}
    model, engine = ulsad(arguments), engine_for(arguments, **length)
    engine.fit(model, datamodule=datamodule)
    report("Ulsad", engine.test(model, datamodule=datamodule, verbose=False)[0])


def run_unislad(arguments: argparse.Namespace, datamodule: AnomalibDataModule) -> None:
    """Fit Unislad with banks of raw features, and test each reading with banks made of these."""
    raw = unislad(arguments, **READINGS["raw"], normalize_scores=False)
    engine_for(arguments, limit_val_batches=0).fit(raw, datamodule=datamodule)
    state = {key: value for key, value in raw.model.state_dict().items() if "_bank." not in key}
    for reading in arguments.readings:
        model, engine = unislad(arguments, **READINGS[reading]), engine_for(arguments)
        model.model.load_state_dict(state, strict=False)
        for bank in BANKS:
            getattr(model.model, bank).fit(getattr(raw.model, bank).neighbors.bank)
        engine.validate(model, datamodule=datamodule, verbose=False)
        name = f"Unislad_{arguments.category}_{reading}_{arguments.aggregation}"
        engine.trainer.save_checkpoint(arguments.results / f"{name}.ckpt")
        report(name, engine.test(model, datamodule=datamodule, verbose=False)[0])


def load_data(dataset: str, category: str, root: str | None) -> AnomalibDataModule:
    """Build the datamodule, with normal validation images."""
    settings: dict[str, Any] = {"category": category, "train_batch_size": 4, "eval_batch_size": 8, "num_workers": 0}
    if root:
        settings["root"] = root
    if "Loco" not in dataset:
        settings |= {"val_split_mode": "from_train", "val_split_ratio": 0.2, "seed": 0}
    return getattr(anomalib.data, dataset)(**settings)


def ulsad(arguments: argparse.Namespace) -> AnomalibModule:
    """Build Ulsad, smaller than the paper's."""
    return Ulsad(
        backbone=BACKBONE,
        layers=LAYERS,
        weights="wheel",
        feature_dim=arguments.feature_dim,
        # These layers end in linear convolutions: their features are as often negative as positive.
        final_activation=False,
        lr=1e-3,
        pre_processor=Ulsad.configure_pre_processor((arguments.image_size,) * 2),
        **parts_of(arguments),
    )


def unislad(arguments: argparse.Namespace, **reading: bool) -> Unislad:
    """Build Unislad with its defaults, but for the networks and what a reading says."""
    return Unislad(
        backbone=BACKBONE,
        blocks=BLOCKS,
        weights="wheel",
        local_dim=448,  # half of the blocks' channels
        vit=arguments.vit,
        vit_layer=arguments.vit_layer,
        vit_weights=arguments.vit_weights,
        aggregation=arguments.aggregation,
        pre_processor=Unislad.configure_pre_processor((arguments.image_size,) * 2),
        **parts_of(arguments),
        **reading,
    )


def patchcore(arguments: argparse.Namespace) -> AnomalibModule:
    """Build Patchcore with the wheel's weights and the network's own normalisation of images."""
    config = timm.get_pretrained_cfg(BACKBONE)
    transform = Compose(
        [Resize((arguments.image_size,) * 2, antialias=True), Normalize(mean=config.mean, std=config.std)]
    )
    model = Patchcore(
        backbone=BACKBONE,
        layers=LAYERS,
        pre_trained=False,
        coreset_sampling_ratio=0.01,  # Patchcore's smallest published ratio; the selection takes minutes as it is
        pre_processor=PreProcessor(transform),
        post_processor=RankPreservingPostProcessor(),
        **parts_of(arguments),
    )
    network = model.model.feature_extractor.feature_extractor
    weights = FrozenBackbone(BACKBONE, ["blocks.6"], "wheel").network.state_dict()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return model


def report(name: str, metrics: dict[str, float]) -> None:
    """Print metrics as lines of a Markdown table, in per cent."""
    print(f"\n{name}\n\n| metric | value |\n|---|---|")
    for metric, value in sorted(metrics.items()):
        if "F1Score" not in metric:
            print(f"| {metric} | {100 * value:.2f} |", flush=True)


if __name__ == "__main__":
    main()
