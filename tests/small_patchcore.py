"""Anomalib's Patchcore, trained in a moment."""

from pathlib import Path

import torch
from anomalib.engine import Engine
from anomalib.models import Patchcore
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize

from anomalib_pack.data import MVTecLoco


def trained_patchcore(loco_root: Path, root: Path, post_processor: PostProcessor, size: tuple[int, int]) -> Path:
    """Train one on rendered trays of a size (height, width); its checkpoint, which does not say its class."""
    torch.manual_seed(0)
    model = Patchcore(
        "resnet18",
        ["layer1"],
        pre_trained=False,
        coreset_sampling_ratio=0.01,
        pre_processor=PreProcessor(Resize(size)),
        post_processor=post_processor,
        visualizer=False,
    )
    engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=MVTecLoco(root=loco_root, category="tray", eval_batch_size=4, num_workers=0))
    return Path(engine.best_model_path)
