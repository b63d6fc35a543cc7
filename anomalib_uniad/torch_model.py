"""UniAD's network, anomaly map and score.

Paper: You et al., "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022, https://arxiv.org/abs/2206.03687.
Published code: https://github.com/zhiyuanyou/UniAD (Apache-2.0; facts only; written from the paper).
Status: agrees with the published code to 1e-4. Where paper and code differ the code is the default, because the paper's
numbers come from it; each such place is marked and listed in the README.

Shapes: B images, H x W pixels, C channels of the joined features (272), h x w their grid (14 x 14), N = h w tokens in
row-major order, D channels inside the transformer (256).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.backbones import Backbone, FrozenBackbone
from anomalib_pack.checks import require
from anomalib_pack.folding import Folding
from anomalib_pack.packing import Linear
from anomalib_pack.region import Polygons, build_region
from anomalib_pack.tiling import TakesTiles

from .anomaly_map import POOLING, full_size, image_score, reconstruction_error
from .components import DECODERS, Cnn, LearnedPositions, Mlp, SinePositions, Transformer, neighbor_mask

RECONSTRUCTIONS = ("transformer", "mlp", "cnn")
QUERIES = ("layerwise", "first", "none")
POSITIONS = {"learned": LearnedPositions, "sine": SinePositions}
LOSSES = ("mse", "normalized_mse", "cosine")
SCORES = ("max", "mean", "std")


class Reconstruction(NamedTuple):
    """What the networks make of a batch, each (B, C, h, w)."""

    features: torch.Tensor  # f_org
    reconstruction: torch.Tensor  # f_rec


def join_features(features: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """Resize feature maps (B, C_l, h_l, w_l) to one grid and concatenate them: (B, C, h, w) (Sec. 3.3)."""
    # Published code: bilinear with align_corners and without antialiasing, also where it shrinks.
    resized = [F.interpolate(maps, size=grid, mode="bilinear", align_corners=True) for maps in features]
    return torch.cat(resized, dim=1)


def jitter(tokens: torch.Tensor, noise: torch.Tensor, scale: float) -> torch.Tensor:
    """Disturb tokens in proportion to their length (Eq. 3).

    Args:
        tokens: f_tok, (B, N, C).
        noise: Standard normal, (B, N, C).
        scale: alpha, at least 0.

    Returns:
        (B, N, C).

    Example:
        >>> jitter(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, -2.0]]]), scale=2.0)
        tensor([[[ 8., -6.]]])
    """
    sigma = scale * torch.linalg.vector_norm(tokens, dim=2, keepdim=True) / tokens.shape[2]
    return tokens + noise * sigma


class FeatureReconstruction(nn.Module):
    """Reconstruction network (Fig. 3): linear projection, transformer, linear projection. Published parameter names.

    The arguments of attention, queries and positions are the transformer's alone.

    Args:
        channels: C.
        grid: (h, w).
        reconstruction: ``"transformer"``, or ``"mlp"`` or ``"cnn"`` in its place (appendix B.1).
        hidden_dim: D.
        num_heads: Heads of each attention.
        dim_feedforward: Hidden channels of the feed-forward networks.
        num_layers: Numbers of encoder and decoder layers.
        dropout: Probability, in training.
        neighbors: (height, width) of the hidden window (Table 5c).
        masked: Where attention is masked: encoder, first and second attention of the decoder (Table 5d).
        query: ``"layerwise"``, ``"first"`` or ``"none"`` (Table 5a).
        decoder: Design of layers with their own queries (Table A3).
        position_embedding: ``"learned"`` or ``"sine"``.
        jitter_scale: alpha of Eq. 3 (Table 5e).
        jitter_prob: p of Sec. 3.2 (Table 5f).
    """

    mask: torch.Tensor | None

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        reconstruction: str,
        hidden_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: tuple[int, int],
        dropout: float,
        neighbors: tuple[int, int],
        masked: tuple[bool, bool, bool],
        query: str,
        decoder: str,
        position_embedding: str,
        jitter_scale: float,
        jitter_prob: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.masked = masked
        self.jitter_scale = jitter_scale
        self.jitter_prob = jitter_prob
        tokens = grid[0] * grid[1]
        self.input_proj = Linear(channels, hidden_dim)
        self.baseline: nn.Module | None = None
        if reconstruction == "mlp":
            self.baseline = Mlp(tokens, hidden_dim, dim_feedforward, num_layers, dropout)
        elif reconstruction == "cnn":
            self.baseline = Cnn(grid, hidden_dim)
        else:
            self.pos_embed = POSITIONS[position_embedding](grid, hidden_dim)
            self.transformer = Transformer(
                tokens, hidden_dim, num_heads, dim_feedforward, num_layers, dropout, query, decoder
            )
        self.output_proj = Linear(hidden_dim, channels)
        masks = any(masked) and self.baseline is None
        self.register_buffer("mask", neighbor_mask(grid, neighbors) if masks else None, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):  # published code
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Reconstruct features (B, C, h, w); in training mode from jittered ones."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        if self.training:
            # Published code: one draw decides for the whole batch. It stays on the device, and nobody waits for it.
            drawn = torch.rand((), device=tokens.device) < self.jitter_prob
            tokens = torch.where(drawn, jitter(tokens, torch.randn_like(tokens), self.jitter_scale), tokens)
        decoded = self._decode(self.input_proj(tokens))
        return self.output_proj(decoded).transpose(1, 2).unflatten(2, self.grid)  # (B, N, C) -> (B, C, h, w)

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.baseline is not None:
            return self.baseline(tokens)
        masks = [self.mask if masked else None for masked in self.masked]
        return self.transformer(tokens, self.pos_embed(), masks)


class UniadModel(TakesTiles):
    """UniAD (Fig. 3): frozen features, their reconstruction, anomaly map and score.

    Images are RGB in [0, 1]; the backbone normalises them itself. With the image score ``"max"`` they have at least
    16 x 16 pixels.

    Args:
        backbone: Name of a timm network. Paper: EfficientNet-b4 (Sec. 3.3).
        layers: Layers of it. Paper: stages 1 to 4, the last layer at strides 2, 4, 8 and 16.
        weights: Weights of the backbone, see :meth:`anomalib_pack.backbones.Backbone.load_weights`.
        train_backbone: Whether the backbone is trained along (Table A5).
        reconstruction: ``"transformer"``, or ``"mlp"`` or ``"cnn"`` in its place (appendix B.1).
        feature_size: Side of the feature grid, or (h, w).
        hidden_dim: D.
        num_heads: Heads of each attention.
        dim_feedforward: Hidden channels of the feed-forward networks (Table A1).
        num_encoder_layers: Layers of the neighbour masked encoder (Table 5b).
        num_decoder_layers: Layers of the layer-wise query decoder (Table 5b).
        dropout: Probability, in training.
        neighbor_size: Side of the hidden window, or (height, width) (Table 5c).
        neighbor_mask: Where attention is masked: encoder, first and second attention of the decoder (Table 5d).
        query: Learned queries in every decoder layer, the first or none (Table 5a).
        decoder: Design of layers with their own queries (Table A3), a key of
            :data:`~anomalib_uniad.components.DECODERS`.
        jitter_scale: alpha of Eq. 3 (Table 5e).
        jitter_prob: Probability that a batch is jittered (Table 5f).
        position_embedding: ``"learned"`` or ``"sine"``.
        loss: What the anomaly map measures, the loss that the model is trained with (Table A4).
        image_score: ``"max"``, ``"mean"`` or ``"std"`` of the anomaly map.
        region: What of the image counts, see :func:`~anomalib_pack.region.build_region`.

    Raises:
        ValueError: If a value is impossible; the message names the argument.

    Example:
        >>> model = UniadModel("resnet18", ["layer1", "layer2"], weights=None, hidden_dim=32).eval()
        >>> model(torch.rand(1, 3, 224, 224)).anomaly_map.shape
        torch.Size([1, 1, 224, 224])
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layers: Sequence[str] = ("blocks.0", "blocks.1", "blocks.2", "blocks.4"),
        weights: str | Path | None = "hub",
        *,
        train_backbone: bool = False,
        reconstruction: str = "transformer",
        feature_size: int | Sequence[int] = 14,
        hidden_dim: int = 256,
        num_heads: int = 8,
        dim_feedforward: int = 1024,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 4,
        dropout: float = 0.1,
        neighbor_size: int | Sequence[int] = 7,
        neighbor_mask: Sequence[bool] = (True, True, True),
        query: str = "layerwise",
        decoder: str = "encoder_then_previous",
        jitter_scale: float = 20.0,
        jitter_prob: float = 1.0,
        position_embedding: str = "learned",
        loss: str = "mse",
        image_score: str = "max",
        region: Polygons | str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("dim_feedforward", dim_feedforward)):
            require(name, value, value >= 1, "at least 1")
        # A half of the channels for the row and one for the column, each with sine and cosine.
        step = 4 if position_embedding == "sine" else 2
        fits = hidden_dim >= 1 and hidden_dim % step == 0 and hidden_dim % num_heads == 0
        require("hidden_dim", hidden_dim, fits, f"a multiple of {step} and of num_heads ({num_heads})")
        require("num_encoder_layers", num_encoder_layers, num_encoder_layers >= 0, "at least 0")
        require("reconstruction", reconstruction, reconstruction in RECONSTRUCTIONS, f"one of {RECONSTRUCTIONS}")
        least = 1 if query == "first" or reconstruction == "mlp" else 0  # the only query is the first layer's
        require("num_decoder_layers", num_decoder_layers, num_decoder_layers >= least, f"at least {least}")
        require("dropout", dropout, 0 <= dropout < 1, "at least 0 and below 1")
        require("neighbor_mask", neighbor_mask, len(neighbor_mask) == 3, "three booleans")
        require("query", query, query in QUERIES, f"one of {QUERIES}")
        require("decoder", decoder, decoder in DECODERS, f"one of {tuple(DECODERS)}")
        fits = query == "layerwise" or decoder == "encoder_then_previous"
        require("decoder", decoder, fits, f"left at its default with query={query!r}, which has no design to choose")
        require("jitter_scale", jitter_scale, jitter_scale >= 0, "at least 0")
        require("jitter_prob", jitter_prob, 0 <= jitter_prob <= 1, "between 0 and 1")
        require("position_embedding", position_embedding, position_embedding in POSITIONS, f"one of {tuple(POSITIONS)}")
        require("loss", loss, loss in LOSSES, f"one of {LOSSES}")
        require("image_score", image_score, image_score in SCORES, f"one of {SCORES}")
        self.loss = loss
        self.image_score = image_score
        self.region = build_region(region)
        self.grid = _pair("feature_size", feature_size)
        self.backbone = (Backbone if train_backbone else FrozenBackbone)(backbone, layers, weights)
        self.reconstruction = FeatureReconstruction(
            sum(self.backbone.channels),
            self.grid,
            reconstruction=reconstruction,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            dim_feedforward=dim_feedforward,
            num_layers=(num_encoder_layers, num_decoder_layers),
            dropout=dropout,
            neighbors=_pair("neighbor_size", neighbor_size),
            masked=tuple(neighbor_mask),
            query=query,
            decoder=decoder,
            position_embedding=position_embedding,
            jitter_scale=jitter_scale,
            jitter_prob=jitter_prob,
        )
        self._folding = Folding()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Extract f_org, (B, C, h, w), from RGB images in [0, 1].

        Raises:
            ValueError: If the images are too small.
        """
        self.check_image_size(images.shape[-2:])
        return join_features(self.backbone(images), self.grid)

    def check_image_size(self, size: Sequence[int]) -> None:
        """Check that images of this (height, width) can be scored.

        Raises:
            ValueError: If a side is below that of the score's pooling window.
        """
        if self.image_score == "max" and min(size) < POOLING:
            msg = (
                f"Uniad takes images of at least {POOLING} x {POOLING} pixels, got {tuple(size)} (height, width). Set "
                "the pre-processor's Resize accordingly."
            )
            raise ValueError(msg)

    def reconstruct(self, features: torch.Tensor) -> Reconstruction:
        """Reconstruct f_org, (B, C, h, w)."""
        return Reconstruction(features, self._folding.run(self.reconstruction, features, nn.Module.__call__))

    def forward(self, images: torch.Tensor) -> Reconstruction | InferenceBatch:
        """Run the model.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).

        Returns:
            In training mode what :class:`~anomalib_uniad.loss.UniadLoss` takes; in eval mode the anomaly map
            (B, 1, H, W) and the image score (B,), at least 0.
        """
        if self.training:
            return self.reconstruct(self.features(self.drawn(images)))
        return self.over_tiles(images, self._detect)

    def _detect(self, images: torch.Tensor) -> InferenceBatch:
        result, size = self.reconstruct(self.features(images)), images.shape[-2:]
        error = reconstruction_error(*result, self.loss).unsqueeze(1)  # (B, 1, h, w)
        anomaly_map = self.counted.clear(self.counted.smooth(error, lambda maps: full_size(maps.squeeze(1), size)))
        score = image_score(anomaly_map, self.image_score, self.counted)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def load_official_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load a trained reconstruction network under the names of the published code.

        Args:
            state_dict: Names such as ``reconstruction.transformer.encoder.layers.0.linear1.weight``, with or without a
                leading ``module.``. Other parts (the backbone, which :class:`Backbone` loads) are left out.

        Raises:
            ValueError: If tensors are missing, foreign to this network or of another shape; the message names them.
        """
        prefix = "reconstruction."
        official = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
        own = {name.removeprefix(prefix): tensor for name, tensor in official.items() if name.startswith(prefix)}
        try:
            self.reconstruction.load_state_dict(own)
        except RuntimeError as error:  # torch names each tensor
            raise ValueError(str(error)) from error


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    require(name, value, len(pair) == 2 and min(pair) >= 1, "one or two whole numbers of at least 1")
    return pair[0], pair[1]
