"""The configurations say what the paper does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from anomalib.metrics import Evaluator
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser
from torchvision.transforms.v2 import (
    Compose,
    InterpolationMode,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    Transform,
)

from anomalib_minimaxad import MiniMaxAd
from anomalib_pack.data import AeBAD, MultiCategory

CONFIGS = Path(__file__).parents[2] / "configs" / "minimaxad"

# Rows "Ours" of Tables 1 to 3: loss, share of the map in the image score, side of the window of the blur, side of the
# images, and epochs.
ROWS = {
    "aebad": ("fp", 0.0, 33, 224, 130),
    "aebad_mvtec_ad": ("fr", 0.01, 5, 224, 20),
    "visa": ("fp", 0.0, 5, 256, 150),
    "mvtec_ad_unified": ("fr", 0.01, 5, 256, 160),
    "visa_unified": ("fr", 0.01, 5, 256, 160),
    "real_iad_unified": ("fr", 0.01, 5, 256, 1),
    "real_iad": ("fr", 0.01, 5, 256, 50),
    "goods_ad": ("fr", 0.01, 5, 224, 240),
}
HALVES = {"aebad_mvtec_ad_test_aebad": AeBAD, "aebad_mvtec_ad_test_mvtec_ad": MultiCategory}


def read(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_each_row_has_a_file() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*ROWS, *HALVES}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    config = read(name)
    model = config["model"].get("init_args", {})
    side = 256
    if "pre_processor" in model:
        transform = model["pre_processor"]["init_args"]["transform"]["init_args"]
        last = transform["transforms"][-1]["init_args"] if "transforms" in transform else transform
        side = last["size"] if isinstance(last["size"], int) else last["size"][0]
    scoring = (model.get("top_ratio", 0.01), model.get("blur_width", 5))
    assert (model.get("variant", "fr"), *scoring, side, config["trainer"]["max_epochs"]) == ROWS[name]
    assert [callback["init_args"] for callback in config["trainer"]["callbacks"]] == [{"seed": 111}]
    data = config["data"]["init_args"]
    assert data["train_batch_size"] == 16
    assert (data["val_split_mode"], data["val_split_ratio"]) == ("from_train", 0.1)  # never thresholds from test labels
    assert data.get("dataset_args") == ({"resolution": 512} if "real_iad" in name else None)


def test_aebad_is_trained_on_crops_of_the_image_itself() -> None:
    """What the data loader and the pre-processor do after it takes the frame away that was added, and nothing else."""
    config = read("aebad")
    pre_processor = build(PreProcessor, config["model"]["init_args"]["pre_processor"])
    augmentations = build(Transform, config["data"]["init_args"]["train_augmentations"])
    published = Compose(
        [
            RandomResizedCrop(224, scale=(0.7, 1), interpolation=InterpolationMode.BICUBIC, antialias=True),
            RandomHorizontalFlip(),
        ]
    )
    assert trained_on(augmentations, pre_processor, published)


def test_joined_data_is_cropped_for_one_data_set_only() -> None:
    """The pre-processor, which goes into the checkpoint, is that of AeBAD alone; images of MVTec AD stay whole."""
    alone, joined = read("aebad"), read("aebad_mvtec_ad")
    pre_processor, data = joined["model"]["init_args"]["pre_processor"], joined["data"]["init_args"]
    assert pre_processor == alone["model"]["init_args"]["pre_processor"]
    aebad, *others = [folder["init_args"] for folder in data["dataset"]]
    assert len(others) == 15
    assert all(other["augmentations"] == others[0]["augmentations"] for other in others)

    def before_the_model(own: dict) -> Compose:
        return Compose([build(Transform, own), build(Transform, data["augmentations"])])

    pre_processor = build(PreProcessor, pre_processor)
    alone_in_training = build(Transform, alone["data"]["init_args"]["train_augmentations"])
    assert trained_on(
        before_the_model(aebad["train_augmentations"]), pre_processor, Compose(alone_in_training.transforms[:2])
    )
    image, crop = torch.rand(3, 300, 280), pre_processor.transform
    for own, expected in ((aebad, crop(image)), (others[0], Resize([224, 224])(image))):
        assert torch.equal(crop(before_the_model(own["augmentations"])(image)), expected)


@pytest.mark.parametrize("name", HALVES)
def test_half_of_the_joined_data(name: str) -> None:
    """It is tested by the model as it was trained, on images as in training, from the command line too."""
    assert read(name)["model"] == read("aebad_mvtec_ad")["model"]
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--ckpt_path", "model.ckpt"]
    cli = AnomalibCLI(["test", *arguments, "--model.encoder", "unireplknet_a"], run=False)  # quick to build
    assert type(cli.datamodule) is HALVES[name]
    assert str(cli.config.test.trainer.default_root_dir) == "results/aebad_mvtec_ad"  # not among results of one half
    assert isinstance(cli.model, MiniMaxAd)
    assert (cli.model.model.top_ratio, cli.model.model.blur_width) == (0.01, 5)
    image, crop = torch.rand(3, 300, 280), cli.model.pre_processor.transform
    expected = crop(image) if HALVES[name] is AeBAD else Resize([224, 224])(image)
    assert torch.equal(crop(in_the_loader(cli.datamodule.test_augmentations, crop)(image)), expected)


def test_metrics_of_aebad() -> None:
    """Those of Table 1; the joined run's AUPRO is the pooled one, which all models report."""
    evaluator = build(Evaluator, read("aebad")["model"]["init_args"]["evaluator"])
    assert [metric.name for metric in evaluator.test_metrics] == [
        "image_AUROC",
        "pixel_AUPRO_per_image",
        "pixel_AUPRO",
    ]
    assert read("aebad")["data"]["init_args"]["vanished_as_normal"]
    assert not any("vanished_as_normal" in read(name)["data"]["init_args"] for name in HALVES)


def trained_on(augmentations: Transform, pre_processor: PreProcessor, expected: Transform) -> bool:
    """Whether the network gets what is expected, for several draws."""
    image, views = torch.rand(3, 300, 280), []
    for view in (Compose([in_the_loader(augmentations, pre_processor.transform), pre_processor.transform]), expected):
        torch.manual_seed(0)
        views.append([view(image) for _ in range(6)])
    return all(map(torch.equal, *views)) and not torch.equal(views[0][0], views[0][1])


def in_the_loader(augmentations: Transform | None, model_transform: Transform) -> Transform:
    """The augmentations of a dataset: Anomalib adds the model's Resize."""
    dataset = SimpleNamespace()
    AnomalibDataModule._update_subset_augmentations(dataset, augmentations, model_transform)
    return dataset.augmentations


def build(base: type, config: dict) -> object:
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, "part")
    return parser.instantiate_classes(parser.parse_object({"part": config})).part
