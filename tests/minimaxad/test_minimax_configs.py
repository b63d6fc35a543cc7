"""The configurations say what the paper does."""

from pathlib import Path

import pytest
import torch
import yaml
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser
from torchvision.transforms.v2 import Compose, Resize, Transform

CONFIGS = Path(__file__).parents[2] / "configs" / "minimaxad"

# Rows "Ours" of Tables 1 to 3: loss, share of the map in the image score, side of the images, and epochs.
ROWS = {
    "aebad": ("fp", 0.0, 224, 130),
    "aebad_mvtec_ad": ("fr", 0.0, 224, 20),
    "visa": ("fp", 0.0, 256, 150),
    "mvtec_ad_unified": ("fr", 0.01, 256, 160),
    "visa_unified": ("fr", 0.01, 256, 160),
    "real_iad_unified": ("fr", 0.01, 256, 1),
    "real_iad": ("fr", 0.01, 256, 50),
    "goods_ad": ("fr", 0.01, 224, 240),
}
SWEEPS = {"table4": 4, "table5": 8, "table10": 4 * 6, "table11": 9 * 6}  # jobs; GoodsAD has six categories


def read(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_each_row_has_a_file() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*ROWS, *SWEEPS}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    config = read(name)
    model = config["model"].get("init_args", {})
    side = 256
    if "pre_processor" in model:
        transform = model["pre_processor"]["init_args"]["transform"]["init_args"]
        last = transform["transforms"][-1]["init_args"] if "transforms" in transform else transform
        side = last["size"] if isinstance(last["size"], int) else last["size"][0]
    ours = (model.get("variant", "fr"), model.get("top_ratio", 0.01), side, config["trainer"]["max_epochs"])
    assert ours == ROWS[name]
    data = config["data"]["init_args"]
    assert (data["train_batch_size"], data["seed"]) == (16, 0)
    assert (data["val_split_mode"], data["val_split_ratio"]) == ("from_train", 0.1)  # never thresholds from test labels


def test_joined_data_is_cropped_for_one_data_set_only() -> None:
    """The pre-processor, which goes into the checkpoint, is that of AeBAD alone; images of MVTec AD stay whole."""
    alone, joined = read("aebad"), read("aebad_mvtec_ad")
    pre_processor, data = joined["model"]["init_args"]["pre_processor"], joined["data"]["init_args"]
    assert pre_processor == alone["model"]["init_args"]["pre_processor"]
    aebad, *others = [folder["init_args"] for folder in data["dataset"]]
    assert aebad["train_augmentations"] == alone["data"]["init_args"]["train_augmentations"]
    assert len(others) == 15
    assert all(other["augmentations"] == others[0]["augmentations"] for other in others)

    image, crop = torch.rand(3, 300, 280), build(PreProcessor, pre_processor).transform
    for own, expected in ((aebad, crop(image)), (others[0], Resize([224, 224])(image))):
        before = Compose([build(Transform, own["augmentations"]), build(Transform, data["augmentations"])])
        assert torch.equal(crop(before(image)), expected)


def build(base: type, config: dict) -> object:
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, "part")
    return parser.instantiate_classes(parser.parse_object({"part": config})).part


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep(name: str) -> None:
    jobs = list(get_iterator_from_grid_dict(read(name)["benchmark"]))
    assert len(jobs) == SWEEPS[name]
    assert jobs[0]["data"]["init_args"]["train_batch_size"] == 16
