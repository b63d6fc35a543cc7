"""Network, neck, jitter, loss, map and score against numbers of the published code, to 1e-4."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_uniad.anomaly_map import full_size, image_score, reconstruction_error
from anomalib_uniad.loss import UniadLoss
from anomalib_uniad.torch_model import FeatureReconstruction, Reconstruction, UniadModel, jitter, join_features

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "uniad_a.npz"
SIZES = {"hidden_dim": 32, "num_heads": 4, "dim_feedforward": 64}  # those that the numbers were computed with

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference numbers of the published code are not here"),
]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def network(golden: dict[str, torch.Tensor], masked: tuple[bool, bool, bool] = (True, True, True)):
    model = FeatureReconstruction(
        24,
        (7, 7),
        reconstruction="transformer",
        **SIZES,
        num_layers=(2, 2),
        dropout=0.1,
        neighbors=(3, 3),
        masked=masked,
        query="layerwise",
        decoder="encoder_then_previous",
        position_embedding="learned",
        jitter_scale=20.0,
        jitter_prob=1.0,
    )
    model.load_state_dict({k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")})
    return model.eval()


@torch.no_grad()
def test_stages(golden: dict[str, torch.Tensor]) -> None:
    model = network(golden)
    tokens = model.input_proj(golden["in/feature_align"].flatten(2).transpose(1, 2))
    positions, mask = model.pos_embed(), model.mask
    close(tokens.transpose(0, 1), golden["out/tokens_projected"])
    close(positions, golden["out/pos_embed"])
    torch.testing.assert_close(mask, golden["out/attn_mask"], atol=0, rtol=0)
    memory = model.transformer.encoder(tokens, positions, mask)
    close(memory.transpose(0, 1), golden["out/encoder_output"])
    decoded = model.transformer.decoder(memory, positions, (mask, mask))
    close(decoded.transpose(0, 1), golden["out/decoder_output"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("masked", "name"),
    [
        ((True, True, True), "feature_rec"),
        ((True, False, False), "feature_rec_mask_100"),
        ((True, True, False), "feature_rec_mask_110"),
        ((True, False, True), "feature_rec_mask_101"),
        ((False, False, False), "feature_rec_mask_none"),
    ],
)
def test_reconstruction(golden: dict[str, torch.Tensor], masked: tuple[bool, bool, bool], name: str) -> None:
    close(network(golden, masked)(golden["in/feature_align"]), golden[f"out/{name}"])


def test_official_names(golden: dict[str, torch.Tensor]) -> None:
    model = UniadModel(
        "resnet18", ["layer1"], weights=None, feature_size=7, neighbor_size=3, **SIZES,
        num_encoder_layers=2, num_decoder_layers=2,
    ).eval()  # fmt: skip
    model.reconstruction.input_proj = torch.nn.Linear(24, 32)  # the numbers' 24 channels instead of resnet18's 64
    model.reconstruction.output_proj = torch.nn.Linear(32, 24)
    state = {f"module.reconstruction.{k.removeprefix('state/')}": v for k, v in golden.items() if k[:6] == "state/"}
    model.load_official_state_dict(state | {"module.backbone.conv1.weight": torch.zeros(1)})
    with torch.no_grad():
        close(model.reconstruction(golden["in/feature_align"]), golden["out/feature_rec"])


def test_map_and_score(golden: dict[str, torch.Tensor]) -> None:
    error = reconstruction_error(golden["in/feature_align"], golden["out/feature_rec"], "mse")
    close(error.unsqueeze(1), golden["out/pred_low"])
    maps = full_size(error, (112, 112))
    close(maps, golden["out/pred"])
    for kind in ("max", "mean", "std"):
        close(image_score(maps, kind), golden[f"score/{kind}_of_pred"])
        close(image_score(golden["score/map"].unsqueeze(1), kind), golden[f"score/{kind}"])


def test_loss(golden: dict[str, torch.Tensor]) -> None:
    outputs = Reconstruction(golden["in/feature_align"], golden["out/feature_rec"])
    close(UniadLoss()(outputs), golden["out/feature_mse_loss"])


def test_jitter(golden: dict[str, torch.Tensor]) -> None:
    close(jitter(golden["jitter/tokens"], golden["jitter/noise"], scale=20.0), golden["jitter/out"])


def test_neck(golden: dict[str, torch.Tensor]) -> None:
    features = [golden[f"neck/in{index}"] for index in range(3)]
    close(join_features(features, (8, 8)), golden["neck/out"])
