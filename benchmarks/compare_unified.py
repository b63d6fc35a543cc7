"""Uniad and MiniMaxAd as one model over several categories and as one model for each, beside Anomalib's Stfpm.

    python benchmarks/compare_unified.py MVTecAD --root path/to/mvtec_ad
    python benchmarks/compare_unified.py MVTecAD --root path/to/mvtec_ad --models stfpm --settings unified

All models have the same images, backbone and weights. A fifth of each category's training images is held back for
thresholds; nothing is selected on test images: every model keeps its last state, Uniad's settings below were chosen by
the reconstruction error of the held-back normal images, and MiniMaxAd's are its paper's but for what limits the time.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import timm
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Stfpm
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_minimaxad import MiniMaxAd
from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.data import MultiCategory
from anomalib_pack.metrics import GroupEvaluator
from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_uniad import Uniad

BACKBONE = "tf_efficientnet_lite0"
METRICS = ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")
SETTINGS = ("unified", "separate")


class Candidate(NamedTuple):
    """A model to train: how to build it, and for how many epochs."""

    build: Callable[[], AnomalibModule]
    epochs: int


def main() -> None:
    """Train and test, and print each category's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name of a datamodule that takes a category, e.g. MVTecAD")
    parser.add_argument("--root", help="folder of the data set, by default the datamodule's own")
    parser.add_argument("--models", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--epochs", type=int, help="in place of each model's own, which suit minutes on a CPU")
    parser.add_argument("--results", type=Path, default=Path("results/compare_unified"))
    arguments = parser.parse_args()

    every = data(arguments, "all")
    every.prepare_data()
    every.setup()
    categories = list(every.train_data.parts)
    for model, setting in product(arguments.models, arguments.settings):
        shares = [categories] if setting == "unified" else [[category] for category in categories]
        rows: dict[str, dict[str, float]] = {}
        for share in shares:
            rows |= train_and_test(CANDIDATES[model], share, arguments)
        report(f"{model}, {setting}", rows)


def data(arguments: argparse.Namespace, categories: list[str] | str) -> AnomalibDataModule:
    """Build the datamodule of some categories."""
    return MultiCategory(
        arguments.dataset,
        root=arguments.root,
        categories=categories,
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="from_train",
        val_split_ratio=0.2,
        seed=0,
    )


def train_and_test(
    candidate: Candidate, categories: list[str], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Train one model on some categories, and return each category's metrics."""
    seed_everything(0, workers=True)
    model = candidate.build()
    epochs = arguments.epochs or candidate.epochs
    engine = Engine(
        default_root_dir=arguments.results,
        logger=False,
        enable_progress_bar=False,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
    )
    engine.fit(model, datamodule=data(arguments, categories))
    values = engine.test(model, datamodule=data(arguments, categories), verbose=False)[0]
    return {
        category: {metric: values[f"{metric}_{category}"] for metric in METRICS if f"{metric}_{category}" in values}
        for category in categories
    }


def uniad() -> AnomalibModule:
    """Build Uniad, smaller than the paper's and with a higher rate, for a training of minutes on a CPU."""
    return Uniad(
        backbone=BACKBONE,
        weights="wheel",
        hidden_dim=128,
        dim_feedforward=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
        lr=1e-3,
    )


def minimaxad(variant: str) -> AnomalibModule:
    """Build MiniMaxAd with the paper's settings; smaller images, for the time that training takes on a CPU."""
    return MiniMaxAd(
        variant,
        encoder=f"timm:{BACKBONE}",
        weights="wheel",
        pre_processor=MiniMaxAd.configure_pre_processor((192, 192)),
    )


def stfpm() -> AnomalibModule:
    """Build Stfpm with its own settings; only its teacher's weights come from the wheel instead of the hub."""
    config = timm.get_pretrained_cfg(BACKBONE)
    transform = Compose([Resize((224, 224), antialias=True), Normalize(mean=config.mean, std=config.std)])
    create_model = timm.create_model

    def without_hub(*names: str, pretrained: bool = False, **options: object) -> object:  # noqa: ARG001
        return create_model(*names, pretrained=False, **options)

    with patch.object(timm, "create_model", without_hub):
        model = Stfpm(
            backbone=BACKBONE,
            layers=["blocks.1", "blocks.2", "blocks.4"],  # strides 4, 8 and 16, as in its paper
            pre_processor=PreProcessor(transform),
            post_processor=RankPreservingPostProcessor(),
            evaluator=GroupEvaluator(),
        )
    teacher = model.model.teacher_model.feature_extractor
    weights = FrozenBackbone(BACKBONE, ["blocks.6"], "wheel").network.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return model


CANDIDATES = {
    "uniad": Candidate(uniad, 60),  # 1000 in its paper
    "minimaxad_fr": Candidate(partial(minimaxad, "fr"), 20),  # 160 in its paper
    "minimaxad_fp": Candidate(partial(minimaxad, "fp"), 20),
    "stfpm": Candidate(stfpm, 30),  # 100 in its paper
}


def report(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print categories down and metrics across, in per cent, the unweighted mean last."""
    mean = {metric: sum(row[metric] for row in rows.values()) / len(rows) for metric in METRICS}
    print(f"\n{title}\n\n| category | {' | '.join(METRICS)} |\n|{'---|' * (len(METRICS) + 1)}")
    for category, row in {**rows, "mean": mean}.items():
        print(f"| {category} | {' | '.join(f'{100 * row[metric]:.1f}' for metric in METRICS)} |", flush=True)


if __name__ == "__main__":
    main()
