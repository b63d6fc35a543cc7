"""Pictures of both branches' maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, ImageBatch, ImageItem, PredictDataset
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.visualization import visualize_anomaly_map
from PIL import Image

from anomalib_ulsad import BranchVisualizer, Ulsad
from anomalib_ulsad.torch_model import BranchMaps
from anomalib_ulsad.visualizer import branch_maps

SMALL = {"backbone": "resnet18", "weights": None, "feature_dim": 8}
SIDE = 64  # of a panel
PLAIN = {"field_size": (SIDE, SIDE), "text_config": {"enable": False}}


def panel(picture: Image.Image, index: int) -> np.ndarray:
    return np.asarray(picture)[:, index * SIDE : (index + 1) * SIDE]


def heat_map(values: torch.Tensor) -> np.ndarray:
    return np.asarray(visualize_anomaly_map(values).resize((SIDE, SIDE)))


def engine(root: Path, **arguments) -> Engine:
    return Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, **arguments)


def test_each_panel_shows_its_map() -> None:
    ramp = torch.linspace(0, 1, 64 * 64).view(1, 64, 64)
    maps = {"structural_map": ramp, "logical_map": 1 - ramp}
    item = ImageItem(image=torch.rand(3, 64, 64), anomaly_map=ramp.mT[0], pred_mask=ramp[0] > 0.5)
    picture = BranchVisualizer(fields=["logical_map", "anomaly_map", "image", "structural_map"], **PLAIN).draw(
        item, maps
    )
    assert picture.size == (5 * SIDE, SIDE)  # the overlay is last
    np.testing.assert_array_equal(panel(picture, 0), heat_map(maps["logical_map"]))
    np.testing.assert_array_equal(panel(picture, 1), heat_map(item.anomaly_map))
    np.testing.assert_array_equal(panel(picture, 3), heat_map(maps["structural_map"]))
    with_titles = BranchVisualizer(field_size=(SIDE, SIDE)).draw(item, maps)
    assert with_titles.size == (5 * SIDE, SIDE)  # no ground truth
    assert (panel(with_titles, 1) != heat_map(maps["structural_map"])).any()


@pytest.mark.parametrize("post_processor", [True, PostProcessor(), False], ids=["ours", "anomalib's", "none"])
def test_maps_have_the_scale_of_the_combination(post_processor: PostProcessor | bool) -> None:
    """Where both branches agree, all three maps are the same picture."""
    model = Ulsad(**SMALL, post_processor=post_processor)
    if post_processor:
        for name, value in (("_pixel_threshold", 0.4), ("pixel_min", 0.0), ("pixel_max", 0.8)):
            getattr(model.post_processor, name).fill_(value)
    raw = torch.rand(2, 1, 16, 16)
    model.branch_maps = BranchMaps(raw, raw)
    batch = ImageBatch(image=torch.rand(2, 3, 16, 16), anomaly_map=raw.squeeze(1), pred_score=raw.amax(dim=(1, 2, 3)))
    if post_processor:
        model.post_processor.post_process_batch(batch)
    for maps in branch_maps(model).values():
        torch.testing.assert_close(maps.squeeze(1), batch.anomaly_map, atol=1e-6, rtol=0)
    model.branch_maps = BranchMaps(raw, None)
    assert branch_maps(model).keys() == {"structural_map"}


def test_pictures_of_the_commands(loco_root: Path, tmp_path: Path) -> None:
    """Chosen on the command line, with a stock datamodule: every test image has a picture with both maps."""
    folder = loco_root / "tray"
    arguments = {
        "model": "Ulsad",
        "model.backbone": "resnet18",
        "model.weights": "null",
        "model.feature_dim": 8,
        "model.visualizer": "anomalib_ulsad.BranchVisualizer",
        "model.visualizer.field_size": f"[{SIDE},{SIDE}]",
        "model.visualizer.text_config": "{enable: false}",
        "data": "Folder",
        "data.name": "tray",
        "data.root": folder,
        "data.normal_dir": "train/good",
        "data.abnormal_dir": "test/logical_anomalies",
        "data.normal_test_dir": "test/good",
        "data.eval_batch_size": 3,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "default_root_dir": tmp_path,
    }
    cli = AnomalibCLI(["test", *(f"--{name}={value}" for name, value in arguments.items())])
    assert isinstance(cli.datamodule, Folder)
    pictures = sorted(tmp_path.rglob("images/**/*.png"))
    assert len(pictures) == len(cli.datamodule.test_data)
    model = cli.model.eval()
    for item in cli.datamodule.test_data:
        [file] = [path for path in pictures if path.parts[-2:] == Path(item.image_path).parts[-2:]]
        picture = Image.open(file)
        with torch.no_grad():
            maps = model.model.maps(item.image.unsqueeze(0))
        columns = {"structural": 1, "logical": 2} if item.gt_mask is None else {"structural": 2, "logical": 3}
        for name, column in columns.items():
            difference = panel(picture, column).astype(int) - heat_map(getattr(maps, name)[0])
            assert (abs(difference) > 8).mean() < 0.01, name  # an image alone and in a batch differ by rounding


def test_pictures_of_predictions(loco_root: Path, tmp_path: Path) -> None:
    """Images alone have no ground truth; a local branch alone has no logical map."""
    images = PredictDataset(loco_root / "tray" / "test" / "good", image_size=(256, 256))
    for global_loss, panels in (("attention", 5), (None, 4)):
        model = Ulsad(**SMALL, global_loss=global_loss, visualizer=BranchVisualizer(**PLAIN))
        engine(tmp_path / str(panels)).predict(model, dataset=images)
        pictures = list((tmp_path / str(panels)).rglob("images/**/*.png"))
        assert len(pictures) == len(images)
        assert Image.open(pictures[0]).size == (panels * SIDE, SIDE)
        assert model.branch_maps is None  # an export after this would hold them
