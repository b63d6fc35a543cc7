"""Networks, losses and maps against numbers of the published code, to 1e-4."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_pack.quantiles import quantiles
from anomalib_ulsad.anomaly_map import feature_distance, normalise_map, smooth_map
from anomalib_ulsad.loss import UlsadLoss, attention
from anomalib_ulsad.torch_model import (
    Branches,
    BranchMaps,
    FeatureReconstructionNetwork,
    GlobalAutoencoder,
    aggregate_features,
    combine,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference numbers of the published code are not here"),
]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module")
def nets() -> dict[str, torch.Tensor]:
    return load("ulsad_net_a")


@pytest.fixture(scope="module")
def maps() -> dict[str, torch.Tensor]:
    return load("ulsad_map_a")


@pytest.fixture(scope="module")
def branches(maps: dict[str, torch.Tensor]) -> Branches:
    local_features, global_features = maps["pipeline/recons"].chunk(2, dim=1)
    return Branches(maps["pipeline/features"], local_features, global_features, maps["pipeline/autoencoder"])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=TOLERANCE, rtol=0)


def load_network(network: torch.nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    prefix = f"state/{name}/"
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    keys = network.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in keys.missing_keys)
    return network.eval()


@torch.no_grad()
def test_networks(nets: dict[str, torch.Tensor]) -> None:
    reconstruction = load_network(FeatureReconstructionNetwork(16, 32), "featae", nets)
    close(reconstruction(nets["in/features"]), nets["out/featae"])
    autoencoder = load_network(GlobalAutoencoder(16), "autoencoder", nets)
    close(autoencoder(nets["in/image"], (32, 32)), nets["out/autoencoder"])


def test_features(maps: dict[str, torch.Tensor]) -> None:
    close(aggregate_features([maps["pipeline/layer2"], maps["pipeline/layer3"]], 16), maps["pipeline/features_raw"])


def test_attention(maps: dict[str, torch.Tensor], branches: Branches) -> None:
    close(attention(branches.features, branches.features), maps["attn/self"])
    close(attention(branches.autoencoder, branches.features), maps["attn/cross"])


def test_losses(maps: dict[str, torch.Tensor], branches: Branches) -> None:
    losses = UlsadLoss()(branches)
    close(losses["local"], maps["loss/pl"])
    close(losses["global"], maps["loss/pg"])
    close(losses["local_global"], maps["loss/lg"])
    close(sum(losses.values()), maps["loss/total"])


def test_maps_and_scores(maps: dict[str, torch.Tensor], branches: Branches) -> None:
    normalised = {}
    for name, distance in (
        ("local", feature_distance(branches.local_features, branches.features, 0.5)),
        ("global", feature_distance(branches.global_features, branches.autoencoder, 0.5)),
    ):
        close(distance, maps[f"map/{name}_low"])
        smoothed = smooth_map(distance, (256, 256))
        theirs = torch.stack([maps[f"quantile/qa_{name}"], maps[f"quantile/qb_{name}"]])
        close(quantiles(smoothed, (0.9, 0.995)), theirs)
        normalised[name] = normalise_map(smoothed, theirs)
        close(normalised[name], maps[f"map/{name}_blurred"])
    result = combine(BranchMaps(normalised["local"], normalised["global"]))
    close(result.anomaly_map, maps["map/combined"])
    close(result.pred_score, maps["score/image"])
