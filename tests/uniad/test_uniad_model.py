"""What is Uniad's own: initialisation, switches, jittering, schedule, checks."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from anomalib.engine import Engine
from torch import nn
from torch.profiler import profile
from watch import Watch

from anomalib_pack.backbones import Backbone
from anomalib_pack.data import MVTecLoco
from anomalib_pack.packing import packs, unpacked
from anomalib_uniad import Uniad
from anomalib_uniad.torch_model import UniadModel

SMALL = {
    "backbone": "resnet18",
    "layers": ["layer1", "layer2"],
    "weights": None,
    "hidden_dim": 16,
    "dim_feedforward": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}


def network(**arguments) -> UniadModel:
    torch.manual_seed(0)
    return UniadModel(**(SMALL | arguments))


def images(count: int = 2, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def test_size_of_the_default_network() -> None:
    """Appendix: 272 channels at strides 2, 4, 8 and 16; the published module has 7.72 M trainable parameters."""
    model = UniadModel(weights=None)
    assert model.backbone.channels == [24, 32, 56, 160]
    assert model.backbone.strides == [2, 4, 8, 16]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == pytest.approx(7.72e6, abs=5e3)


def test_default_backbone_is_tensorflows() -> None:
    """As in the published code: BatchNorm's eps is 1e-3, and strided convolutions pad more below and to the right."""
    network = UniadModel(weights=None).backbone.network
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    picture = torch.randn(1, 3, 30, 44)
    stem = network.conv_stem.weight
    expected = nn.functional.conv2d(nn.functional.pad(picture, (0, 1, 0, 1)), stem, stride=2)
    torch.testing.assert_close(network.conv_stem(picture), expected)


@pytest.mark.parametrize(
    ("backbone", "channels", "millions"),
    [
        ("resnet18.tv_in1k", [64, 128, 256], 11.4),
        ("resnet34.tv_in1k", [64, 128, 256], 21.5),
        ("resnet50.tv_in1k", [256, 512, 1024], 25.6),
        ("resnet101.tv_in1k", [256, 512, 1024], 44.5),
        ("tf_efficientnet_b0.aa_in1k", [16, 24, 40, 112], 5.3),
        ("tf_efficientnet_b2.aa_in1k", [16, 24, 48, 120], 9.2),
        ("tf_efficientnet_b4.aa_in1k", [24, 32, 56, 160], 19),
        ("tf_efficientnet_b6.aa_in1k", [32, 40, 72, 200], 43),
    ],
)
def test_backbones_of_table_a6(backbone: str, channels: list[int], millions: float) -> None:
    """Each is the table's by its size, and is built with the layers that the README names."""
    efficientnet = "efficientnet" in backbone
    layers = ["blocks.0", "blocks.1", "blocks.2", "blocks.4"] if efficientnet else ["layer1", "layer2", "layer3"]
    with torch.device("meta"):  # shapes only
        whole = timm.create_model(backbone)
        model = UniadModel(backbone, layers, weights=None, neighbor_mask=[False, False, False]).eval()
        result = model(torch.rand(1, 3, 224, 224))
    assert sum(parameter.numel() for parameter in whole.parameters()) == pytest.approx(1e6 * millions, rel=0.03)
    assert model.backbone.channels == channels
    assert result.anomaly_map.shape == (1, 1, 224, 224)


def test_initialisation() -> None:
    """Published code: decoder layers start with one query embedding and packed projection, linear layers do not."""
    reconstruction = network().reconstruction
    first, second = reconstruction.transformer.decoder.layers
    for name in ("learned_embed.weight", "self_attn.in_proj_weight", "multihead_attn.in_proj_weight"):
        assert torch.equal(first.get_parameter(name), second.get_parameter(name)), name
    for name in ("self_attn.out_proj.weight", "linear1.weight", "linear2.weight"):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name)), name
    assert first.learned_embed.weight.std().item() == pytest.approx(1, abs=0.05)
    for module in reconstruction.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5  # xavier uniform
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"train_backbone": True},
        {"reconstruction": "mlp"},
        {"reconstruction": "cnn"},
        {"query": "first"},
        {"query": "none"},
        {"decoder": "previous_then_encoder"},
        {"decoder": "encoder_reads_previous"},
        {"decoder": "previous_reads_encoder"},
        {"decoder": "encoder_for_previous"},
        {"decoder": "previous_for_encoder"},
        {"neighbor_mask": [True, False, False]},
        {"neighbor_mask": [False, False, False], "feature_size": 4},  # no window that could hide everything
        {"neighbor_size": [3, 5]},
        {"feature_size": [10, 20]},
        {"num_encoder_layers": 0},
        {"num_decoder_layers": 0},
        {"position_embedding": "sine"},
        {"loss": "normalized_mse"},
        {"loss": "cosine"},
    ],
    ids=str,
)
def test_switches(arguments: dict, tmp_path: Path) -> None:
    """Each ablation trains every parameter that it has, and changes what the model says."""
    torch.manual_seed(0)
    model = Uniad(**(SMALL | arguments))
    model.loss(model.model.train()(images())).backward()
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        switched, default = model.model.eval()(images()), network().eval()(images())
    assert switched.anomaly_map.isfinite().all()
    assert not torch.allclose(switched.anomaly_map, default.anomaly_map)


@pytest.mark.parametrize("query", ["first", "none"])
def test_decoder_without_queries_of_its_own(query: str) -> None:
    with pytest.raises(ValueError, match=f"decoder must be left at its default with query='{query}'"):
        network(query=query, decoder="previous_then_encoder")


def test_mlp_needs_a_decoder() -> None:
    with pytest.raises(ValueError, match="num_decoder_layers must be at least 1"):
        network(reconstruction="mlp", num_decoder_layers=0)


@pytest.mark.parametrize("reconstruction", ["mlp", "cnn"])
def test_baselines_have_no_window(reconstruction: str) -> None:
    """What would hide everything from an attention does not matter to them."""
    assert network(reconstruction=reconstruction, feature_size=4).reconstruction.mask is None


@pytest.mark.parametrize("kind", ["mean", "std"])
def test_image_score(kind: str) -> None:
    """Scores of the whole map, which no pooling window needs to fit into."""
    with torch.no_grad():
        result = network(image_score=kind).eval()(images(size=(12, 40)))
    torch.testing.assert_close(result.pred_score, getattr(result.anomaly_map.flatten(1), kind)(1), rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match="16 x 16"):
        network().eval()(images(size=(12, 40)))


def test_trained_backbone() -> None:
    """Table A5: the backbone learns from both sides of the loss, with BatchNorm in training mode."""
    model = network(train_backbone=True, jitter_prob=0.0, dropout=0.0).train()
    assert type(model.backbone) is Backbone
    norm = model.backbone.network.bn1
    before = norm.running_mean.clone()
    outputs = model(images())
    assert not torch.equal(norm.running_mean, before)
    weight = model.backbone.network.conv1.weight
    through_target = torch.autograd.grad(outputs.features.square().sum(), weight, retain_graph=True)[0]
    through_network = torch.autograd.grad(outputs.reconstruction.square().sum(), weight)[0]
    assert through_target.abs().sum() > 0
    assert through_network.abs().sum() > 0
    assert not network().train()(images()).features.requires_grad


def test_reconstruction_does_not_depend_on_hidden_neighbours() -> None:
    """Without other ways for a token to reach its neighbours, hiding them hides their content: one encoder layer."""
    model = network(num_encoder_layers=1, num_decoder_layers=0, neighbor_size=5).eval().reconstruction
    layer = model.transformer.encoder.layers[0]
    tokens = torch.randn(1, 196, 16)
    with torch.no_grad():
        before = layer.self_attn(tokens, tokens, tokens, model.mask)
        row, column = 7, 3
        near = [r * 14 + c for r in range(row - 2, row + 3) for c in range(column - 2, column + 3)]
        changed = tokens.clone()
        changed[:, near] += 100
        after = layer.self_attn(tokens, changed, changed, model.mask)
        far = layer.self_attn(tokens, tokens + 100, tokens + 100, model.mask)
    torch.testing.assert_close(after[:, row * 14 + column], before[:, row * 14 + column])
    assert not torch.allclose(after[:, row * 14 + column + 3], before[:, row * 14 + column + 3])
    assert not torch.allclose(far[:, row * 14 + column], before[:, row * 14 + column])


def test_jittering() -> None:
    """While training only, of what is reconstructed, not of the target."""
    model = network(dropout=0.0).train()
    clean = model.features(images())
    first, second = model(images()), model(images())
    assert torch.equal(first.features, clean)
    assert not torch.equal(first.reconstruction, second.reconstruction)
    for arguments in ({"jitter_scale": 0.0}, {"jitter_prob": 0.0}):
        calm = network(dropout=0.0, **arguments).train()
        assert torch.equal(calm(images()).reconstruction, calm(images()).reconstruction)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images()).anomaly_map, model(images()).anomaly_map)


def test_one_draw_decides_for_a_batch() -> None:
    model = network(dropout=0.0, jitter_prob=0.5).train().reconstruction
    features = torch.randn(3, 192, 14, 14)
    with torch.no_grad():
        calm = model.eval()(features)
        model.train()
        same = torch.stack([(model(features) - calm).abs().amax(dim=(1, 2, 3)) < 1e-5 for _ in range(40)])  # (40, 3)
    assert (same.all(dim=1) | ~same.any(dim=1)).all()
    assert 8 <= same[:, 0].sum() <= 32  # of 40 draws at 0.5


def test_half_precision_does_not_merge_scores() -> None:
    model = network().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(images())
    assert result.anomaly_map.dtype == result.pred_score.dtype == torch.float32
    assert result.anomaly_map.isfinite().all()


def test_official_names_with_another_shape() -> None:
    state = {f"reconstruction.{name}": tensor for name, tensor in network().reconstruction.state_dict().items()}
    other = network(hidden_dim=32)
    with pytest.raises(ValueError, match=r"input_proj\.weight"):
        other.load_official_state_dict(state)
    del state["reconstruction.output_proj.bias"]
    with pytest.raises(ValueError, match=r"output_proj\.bias"):
        network().load_official_state_dict(state)
    with pytest.raises(ValueError, match="Missing"):
        network().load_official_state_dict({"backbone.conv1.weight": torch.zeros(1)})


def test_normalisation_is_the_backbones() -> None:
    """Images with another network's statistics would be normalised twice."""
    from anomalib.models import Patchcore

    with pytest.raises(ValueError, match="Normalize"):
        Uniad(**SMALL, pre_processor=Patchcore.configure_pre_processor((224, 224)))


def train(loco: MVTecLoco, root: Path, **trainer) -> tuple[Watch, Uniad]:
    watch = Watch()
    model = Uniad(**SMALL, feature_size=4, neighbor_size=3, pre_processor=Uniad.configure_pre_processor((32, 32)))
    engine = Engine(
        default_root_dir=root, accelerator="cpu", callbacks=[watch], enable_progress_bar=False, logger=False,
        limit_val_batches=1, enable_model_summary=False, **trainer,
    )  # fmt: skip
    engine.fit(model, datamodule=loco)
    return watch, model


def test_schedule_of_a_long_training(loco: MVTecLoco, tmp_path: Path) -> None:
    """The rate drops after four fifths, validations are spread, and the last epoch has one."""
    watch, model = train(loco, tmp_path, max_epochs=45, limit_train_batches=1)
    torch.testing.assert_close(watch.rates, 36 * [1e-4] + 9 * [1e-5])
    assert watch.validated == [*range(1, 44, 2), 44]
    assert model.trainer.gradient_clip_val == 0.1


def test_interval_of_the_user(loco: MVTecLoco, tmp_path: Path) -> None:
    watch, _ = train(loco, tmp_path, max_epochs=45, limit_train_batches=1, check_val_every_n_epoch=30)
    assert watch.validated == [29, 44]


def test_training_that_ends_with_a_step(loco: MVTecLoco, tmp_path: Path) -> None:
    watch, _ = train(loco, tmp_path, max_steps=10, max_epochs=-1, limit_train_batches=4)
    torch.testing.assert_close(watch.rates, 8 * [1e-4] + 2 * [1e-5])
    assert watch.validated[-1] == 2


@torch.no_grad()
@pytest.mark.parametrize("reconstruction", ["transformer", "mlp", "cnn"])
def test_reconstruction_by_a_packed_copy(reconstruction: str) -> None:
    """In eval mode: what the network gives, also after it has changed, and nothing of it in state dict or pickle."""
    model = network(reconstruction=reconstruction).eval()
    names = list(model.state_dict())
    features = model.features(images())
    for _ in range(2):
        expected = model.reconstruction(features)
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(model.reconstruct(features).reconstruction, expected, atol=atol, rtol=0)
        assert model._folding._copy.network is not model.reconstruction
        for parameter in model.reconstruction.parameters():
            parameter.mul_(1.1)
        assert not torch.allclose(model.reconstruction(features), expected, atol=1e-3)
    assert list(model.state_dict()) == names
    assert pickle.loads(pickle.dumps(model))._folding._copy is None


@pytest.mark.skipif(not packs(torch.ones(1)), reason="needs oneDNN on an x86 processor")
@torch.no_grad()
def test_all_products_with_weights_are_packed() -> None:
    """Of the copy; the program that is exported has none, also after a pass."""
    model = network().eval()
    features = model.features(images())
    model.reconstruct(features)
    with profile() as passed:
        model.reconstruct(features)
    names = [event.name for event in passed.events()]
    assert names.count("mkldnn::_linear_pointwise") == 2 + 2 * (4 + 2) + 2 * (8 + 2)
    assert "aten::addmm" not in names
    program = torch.export.export(model, (images(),), strict=False)
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("reconstruction", ["transformer", "mlp"])
def test_gradients_by_other_products(reconstruction: str) -> None:
    """A training step's gradients are those with PyTorch's usual products."""
    model = network(reconstruction=reconstruction).train()
    features = model.features(images())

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        loss = nn.functional.mse_loss(model.reconstruct(features).reconstruction, features)
        return list(torch.autograd.grad(loss, list(model.reconstruction.parameters())))

    with unpacked():
        expected = gradients()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item() + 1e-8, rtol=0)
