"""Anomalib's tiled ensemble, which builds models itself and takes their resize away."""

import shutil
from argparse import Namespace
from pathlib import Path

import anomalib.models
import pandas as pd
import pytest
import yaml
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble

from anomalib_uniad import Uniad
from anomalib_unislad import Unislad


class SmallUniad(Uniad):
    """Small by default: Anomalib's ensemble cannot give a pre-processor to a model that has arguments."""

    def __init__(self, pre_processor=True, visualizer=True):
        super().__init__(
            backbone="tf_efficientnet_lite0",
            weights="wheel",
            layers=["blocks.1", "blocks.2"],
            feature_size=8,
            hidden_dim=32,
            dim_feedforward=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
            pre_processor=pre_processor,
            visualizer=visualizer,
        )


class SmallUnislad(Unislad):
    """Likewise."""

    def __init__(self, pre_processor=True, visualizer=True):
        super().__init__(
            backbone="tf_efficientnet_lite0",
            weights="wheel",
            blocks=["blocks.1.1", "blocks.2.1"],
            local_dim=32,
            vit="vit_tiny_patch16_224",
            vit_layer=2,
            vit_weights=None,
            pre_processor=pre_processor,
            visualizer=visualizer,
        )


def mvtec_ad(category: Path, root: Path) -> Path:
    """Copy a category of MVTec LOCO into MVTec AD's layout, which has one mask for each image."""
    for part in ("train/good", "test/good", "test/structural_anomalies"):
        shutil.copytree(category / part, root / "tray" / part)
    masks = root / "tray" / "ground_truth" / "structural_anomalies"
    masks.mkdir(parents=True)
    for folder in (category / "ground_truth" / "structural_anomalies").iterdir():
        shutil.copy(next(folder.iterdir()), masks / f"{folder.name}_mask.png")
    return root


@pytest.mark.parametrize("model", [SmallUniad, SmallUnislad])
def test_a_model_for_each_tile(
    model: type, loco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Trains, merges the tiles' maps, and reports metrics; the second pipeline loads the checkpoints."""
    monkeypatch.setattr(anomalib.models, model.__name__, model, raising=False)
    monkeypatch.chdir(tmp_path)  # the pipelines write a log there
    arguments = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "tiling": {"image_size": [64, 128], "tile_size": [64, 64], "stride": 64},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {
            "class_path": "MVTecAD",
            "init_args": {
                "root": str(mvtec_ad(loco_root / "tray", tmp_path / "data")),
                "category": "tray",
                "train_batch_size": 4,
                "eval_batch_size": 4,
                "num_workers": 0,
                "val_split_mode": "from_train",
                "val_split_ratio": 0.3,
                "test_split_mode": "from_dir",
            },
        },
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {
            "model": {"class_path": model.__name__},
            "trainer": {"max_epochs": 1, "enable_progress_bar": False},
        },
    }
    config = tmp_path / "ensemble.yaml"
    config.write_text(yaml.safe_dump(arguments))
    training = TrainTiledEnsemble()
    training.run(Namespace(config=config))
    folder = training.root_dir
    assert sorted(path.name for path in folder.glob("weights/lightning/*.ckpt")) == ["model0_0.ckpt", "model0_1.ckpt"]
    EvalTiledEnsemble(folder).run(Namespace(config=config))
    metrics = pd.read_csv(folder / "metric_results.csv")
    assert metrics["image_AUROC"].between(0, 1).all()
    assert metrics["pixel_AUROC"].between(0, 1).all()
    assert "error" not in capfd.readouterr().out  # the pipelines go on after an error, and say that there was one
