"""ULSAD's networks, statistics and quantiles, and what its arguments switch."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from torch.utils.data import DataLoader

from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.data import MVTecLoco
from anomalib_ulsad import Ulsad
from anomalib_ulsad.anomaly_map import feature_distance, normalise_map, smooth_map
from anomalib_ulsad.torch_model import (
    BranchMaps,
    FeatureReconstructionNetwork,
    GlobalAutoencoder,
    UlsadModel,
    combine,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "ulsad"
PAPER = CONFIGS.parent / "papers" / "ulsad" / "runs"
SMALL = {"backbone": "resnet18", "weights": None, "feature_dim": 8}
IMAGES = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def small_model(**arguments) -> UlsadModel:
    return UlsadModel(**(SMALL | arguments))


def fit(model: Ulsad, datamodule: MVTecLoco, root, **arguments) -> Engine:
    engine = Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, **arguments)
    engine.fit(model, datamodule=datamodule)
    return engine


def both_quantiles(maps: torch.Tensor) -> np.ndarray:
    return np.quantile(maps.numpy(), (0.9, 0.995))


def test_sizes_are_the_published_ones() -> None:
    def millions(network: torch.nn.Module) -> float:
        return sum(parameter.numel() for parameter in network.parameters()) / 1e6

    assert millions(FeatureReconstructionNetwork(384, 768)) == pytest.approx(65.5, abs=0.05)
    assert millions(GlobalAutoencoder(384)) == pytest.approx(1.03, abs=0.005)


def test_paper_defaults_and_feature_grid() -> None:
    model = UlsadModel(weights=None).eval()
    features = model.raw_features(torch.rand(1, 3, 256, 256))
    assert features.shape == (1, 384, 32, 32)
    assert (model.backbone.name, model.backbone.strides) == ("wide_resnet50_2.racm_in1k", [8, 16])


def test_backbones_of_figure_7() -> None:
    """The tags are those of the only weights in timm 0.6.12, whose file names are known."""
    files = {
        "resnet50.a1_in1k": "resnet50_a1_0-14fe96d1.pth",
        "resnet152.a1h_in1k": "resnet152_a1h-dc400468.pth",
        "wide_resnet50_2.racm_in1k": "wide_resnet50_racm-8234f177.pth",
        "wide_resnet101_2.tv_in1k": "wide_resnet101_2-32ee1156.pth",
    }
    models = yaml.safe_load((PAPER / "backbones.yaml").read_text())["models"]
    default = inspect.signature(Ulsad).parameters["backbone"].default
    assert [model.get("init_args", {}).get("backbone", default) for model in models] == list(files)
    for name, file in files.items():
        assert timm.get_pretrained_cfg(name).url.endswith(file)
        backbone = FrozenBackbone(name, ["layer2", "layer3"], weights=None)
        assert (backbone.channels, backbone.strides) == ([512, 1024], [8, 16])


def test_resize_steps_of_the_autoencoder() -> None:
    """s/64-1, s/32, s/16-1, s/8-1, s/4-1 and the feature grid, each plus 1 through the even kernel's padding."""
    network, sizes = GlobalAutoencoder(8).eval(), []
    for name in ("enconv6", "deconv1", "deconv2", "deconv3", "deconv4", "deconv5", "deconv7"):
        network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-2:]))
    assert network(torch.rand(1, 3, 256, 512), (32, 64)).shape == (1, 8, 32, 64)
    assert sizes == [(8, 16), (3, 7), (8, 16), (15, 31), (31, 63), (63, 127), (32, 64)]


def test_final_activation() -> None:
    features = torch.randn(2, 8, 16, 16)
    assert FeatureReconstructionNetwork(8, 8).eval()(features).min() >= 0
    assert FeatureReconstructionNetwork(8, 8, final_activation=False).eval()(features).min() < 0


@pytest.mark.parametrize(
    ("global_loss", "local_global", "outputs", "terms"),
    [
        (None, False, 8, {"local"}),  # Table 3, rows 1 and 6
        ("feature", False, 8, {"local", "global"}),  # rows 2 and 7
        ("attention", False, 8, {"local", "global"}),  # rows 3 and 8
        ("feature", True, 16, {"local", "global", "local_global"}),  # rows 4 and 9
        ("attention", True, 16, {"local", "global", "local_global"}),  # rows 5 and 10
    ],
)
def test_rows_of_table_3(global_loss: str | None, local_global: bool, outputs: int, terms: set[str]) -> None:
    models = yaml.safe_load((PAPER / "losses.yaml").read_text())["models"]
    rows = [model["init_args"] for model in models]
    assert [model["name"] for model in models] == [str(number) for number in range(1, 11)]
    for weight in (0.0, 0.5):
        losses = {"global_loss": global_loss, "local_global_loss": local_global}
        assert {"lambda_l": weight, "lambda_g": weight, **losses} in rows
    model = Ulsad(**SMALL, global_loss=global_loss, local_global_loss=local_global, lambda_l=0, lambda_g=0)
    losses = model.loss(model.model(IMAGES))
    assert losses.keys() == terms
    sum(losses.values()).backward()
    for name, parameter in model.model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) == (not name.startswith("backbone."))
    assert model.model.reconstruction.deconv3.out_channels == outputs
    assert model.model.eval()(IMAGES).anomaly_map.shape == (2, 1, 256, 256)


def test_table_28_on_the_command_line() -> None:
    """The local branch alone, with any weight of the direction, from the paper's configuration."""
    changes = ["backbone=resnet18", "feature_dim=8", "global_loss=null", "lambda_l=0.01"]
    options = [f"--model.{change}" for change in changes]
    cli = AnomalibCLI(["fit", "--config", str(CONFIGS / "mvtec_loco.yaml"), *options], run=False)
    branches = cli.model.model(IMAGES)
    expected = feature_distance(branches.local_features, branches.features, 0.01).mean()
    torch.testing.assert_close(cli.model.loss(branches), {"local": expected})


def test_channel_statistics_and_quantiles(loco: MVTecLoco, tmp_path) -> None:
    """Both are those of the whole training and validation set, for the weights that are kept."""
    torch.manual_seed(0)
    model = Ulsad(**SMALL)
    fit(model, loco, tmp_path, max_epochs=2)
    network = model.model.eval()

    def images(dataset) -> torch.Tensor:
        return torch.stack([dataset[index].image for index in range(len(dataset))])

    with torch.no_grad():
        features = network.raw_features(images(loco.train_data)).double()
        maps = network.raw_maps(images(loco.val_data))
    np.testing.assert_allclose(network.feature_mean.flatten(), features.mean(dim=(0, 2, 3)), atol=1e-5)
    std = features.std(dim=(0, 2, 3), unbiased=False)
    np.testing.assert_allclose(network.feature_std.flatten(), std, atol=1e-5)
    np.testing.assert_allclose(network.structural_quantiles, both_quantiles(maps.structural), rtol=1e-4)
    np.testing.assert_allclose(network.logical_quantiles, both_quantiles(maps.logical), rtol=1e-4)


def test_quantiles_take_normal_images_only(loco_root, tmp_path) -> None:
    torch.manual_seed(0)
    datamodule = MVTecLoco(
        root=loco_root, category="tray", eval_batch_size=5, num_workers=0, val_split_mode="same_as_test"
    )
    model = Ulsad(**SMALL)
    fit(model, datamodule, tmp_path, max_epochs=1)
    normal = [
        item.image for item in (datamodule.val_data[i] for i in range(len(datamodule.val_data))) if not item.gt_label
    ]
    assert len(normal) < len(datamodule.val_data)
    with torch.no_grad():
        maps = model.model.eval().raw_maps(torch.stack(normal))
    np.testing.assert_allclose(model.model.structural_quantiles, both_quantiles(maps.structural), rtol=1e-4)


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 2},  # within the first epoch
        {"max_steps": 2, "check_val_every_n_epoch": 5},
        {"max_epochs": 1, "check_val_every_n_epoch": 5},  # no epoch is due for validation
    ],
)
def test_quantiles_and_thresholds_when_training_ends_between_validations(
    loco: MVTecLoco, tmp_path, length: dict[str, int]
) -> None:
    model = Ulsad(**SMALL)
    engine = fit(model, loco, tmp_path, **length)
    assert model.post_processor.image_threshold.isfinite()
    saved = torch.load(engine.best_model_path, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=0, rtol=0, equal_nan=True)
    with torch.no_grad():
        items = [loco.val_data[index].image for index in range(len(loco.val_data))]
        maps = model.model.eval().raw_maps(torch.stack(items))
    np.testing.assert_allclose(model.model.logical_quantiles, both_quantiles(maps.logical), rtol=1e-4)


def test_length_of_training(loco: MVTecLoco, tmp_path) -> None:
    """The paper's 200 epochs unless the user sets a length."""
    model = Ulsad(**SMALL)
    trainer = fit(model, loco, tmp_path, max_epochs=1).trainer
    assert (trainer.max_epochs, trainer.current_epoch) == (1, 1)

    class StopError(Exception):
        """Training would begin now."""

    def stop() -> None:
        raise StopError

    model.on_train_start = stop
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(StopError):
        engine.fit(model, datamodule=loco)
    assert engine.trainer.max_epochs == 200


def test_inference_needs_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_kwargs) -> None:
        raise AssertionError

    model = small_model().eval()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    model(IMAGES)
    with pytest.raises(AssertionError):
        Ulsad(**SMALL).loss(model.train()(IMAGES))


def test_validation_on_other_data_after_training(loco: MVTecLoco, loco_root, tmp_path) -> None:
    """Measures that data, not the validation set of the training."""
    model = Ulsad(**SMALL)
    engine = fit(model, loco, tmp_path, max_epochs=1)
    other = MVTecLoco(root=loco_root, category="tray", num_workers=0, val_split_mode="same_as_test")
    engine.validate(model, datamodule=other)
    items = [other.val_data[index] for index in range(len(other.val_data))]
    with torch.no_grad():
        maps = model.model.eval().raw_maps(torch.stack([item.image for item in items if not item.gt_label]))
    np.testing.assert_allclose(model.model.logical_quantiles, both_quantiles(maps.logical), rtol=1e-4)


def test_validation_is_needed(loco: MVTecLoco, tmp_path) -> None:
    with pytest.raises(ValueError, match="limit_val_batches"):
        fit(Ulsad(**SMALL), loco, tmp_path, max_epochs=1, limit_val_batches=0)


def test_batches_of_one_image(loco: MVTecLoco, tmp_path) -> None:
    loco.train_batch_size = 1
    with pytest.raises(ValueError, match="train_batch_size"):
        fit(Ulsad(**SMALL), loco, tmp_path, max_epochs=1)
    fit(Ulsad(**SMALL, global_loss=None), loco, tmp_path, max_steps=2)  # needs no autoencoder


def test_maps_and_scores_stay_in_single_precision() -> None:
    """Under autocast too: half precision would merge scores."""
    structural, logical = torch.rand(2, 32, 32), torch.rand(2, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.rand(1, 8, 32, 32).bfloat16()
        assert feature_distance(half, half.flip(1), 0.5).dtype == torch.float32
        full = [smooth_map(distance, (256, 256)) for distance in (structural, logical)]
        result = combine(BranchMaps(*(normalise_map(maps, torch.tensor([0.1, 0.9])) for maps in full)))
    assert result.pred_score.dtype == result.anomaly_map.dtype == torch.float32
    assert len(result.anomaly_map.unique()) > 50_000  # of 131 072; bfloat16 has some 1 000


def test_grids_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="finest grid"):
        small_model(layers=["layer3", "layer2"])
    coarse = small_model(layers=["layer3", "layer4"]).eval()
    with pytest.raises(ValueError, match="multiples of 64"):
        coarse(torch.rand(1, 3, 288, 288))
    assert coarse(torch.rand(1, 3, 320, 320)).anomaly_map.shape == (1, 1, 320, 320)


def test_explanation_names_the_branch_that_fired() -> None:
    model = Ulsad(**SMALL).eval()
    model.model.structural_quantiles.copy_(torch.tensor([0.0, 1e6]))  # the structural map vanishes
    batch = model.predict_step(ImageBatch(image=IMAGES, image_path=["a.png", "b.png"]), 0)
    logical = model.model.maps(IMAGES).logical.amax(dim=(1, 2, 3))
    assert batch.explanation == [f"logical {score:.2f}, structural 0.00" for score in logical]


def official_names(model: UlsadModel) -> dict[str, torch.Tensor]:
    """The state of a model under the names of the published code."""
    state = model.state_dict()
    official = {
        "mean_std.mean": state["feature_mean"],
        "mean_std.std": state["feature_std"],
        "quantiles.qa_local": state["structural_quantiles"][0],
        "quantiles.qb_local": state["structural_quantiles"][1],
        "quantiles.qa_global": state["logical_quantiles"][0],
        "quantiles.qb_global": state["logical_quantiles"][1],
    }
    for name, tensor in state.items():
        own, _, rest = name.partition(".")
        if own in {"reconstruction", "autoencoder"}:
            official[{"reconstruction": "featae", "autoencoder": "img_encoder"}[own] + "." + rest] = tensor
    return official


def test_official_state_dict() -> None:
    torch.manual_seed(0)
    source = small_model()
    source.feature_mean.uniform_()
    source.structural_quantiles.copy_(torch.tensor([0.5, 0.7]))
    official = {f"model.{name}": tensor for name, tensor in official_names(source).items()}
    assert {"model.featae.conv1.weight", "model.img_encoder.enconv1.weight"} <= official.keys()

    target = small_model()
    target.backbone.load_state_dict(source.backbone.state_dict())
    target.load_official_state_dict(official)
    torch.testing.assert_close(target.eval()(IMAGES), source.eval()(IMAGES), atol=0, rtol=0)


def test_official_state_dict_without_quantiles(caplog: pytest.LogCaptureFixture) -> None:
    """Published checkpoints of earlier epochs hold zeros: t(M) = M until Engine.validate measures them."""
    official = official_names(small_model()) | {f"quantiles.q{end}_local": torch.zeros(1) for end in "ab"}
    model = small_model()
    model.load_official_state_dict(official)
    assert "structural" in caplog.text
    assert model.eval()(IMAGES).pred_score.isfinite().all()


@pytest.mark.parametrize("missing", ["featae.conv1.weight", "quantiles.qa_local"])
def test_official_state_dict_that_does_not_fit(missing: str) -> None:
    official = official_names(small_model())
    del official[missing]
    with pytest.raises(ValueError, match=missing.rsplit(".", maxsplit=1)[-1]):
        small_model().load_official_state_dict(official)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        small_model(feature_dim=4).load_official_state_dict(official_names(small_model()))


def test_a_pre_processor_that_normalises_is_refused() -> None:
    with pytest.raises(ValueError, match="Normalize"):
        Ulsad(**SMALL, pre_processor=super(Ulsad, Ulsad).configure_pre_processor())


def test_validation_loader_without_normal_images(loco: MVTecLoco, tmp_path) -> None:
    """Loaders given by hand cannot be checked before training; the quantiles then say what is missing."""
    loco.setup()
    anomalous = loco.test_data.subsample([i for i, label in enumerate(loco.test_data.samples.label_index) if label])
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False, max_epochs=1)
    model = Ulsad(**SMALL)
    loaders = [DataLoader(data, batch_size=4, collate_fn=data.collate_fn) for data in (loco.train_data, anomalous)]
    for data in (loco.train_data, anomalous):
        data.augmentations = model.pre_processor.transform
    with pytest.raises(ValueError, match="no normal images"):
        engine.fit(model, *loaders)
