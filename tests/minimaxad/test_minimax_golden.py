"""Networks, merged networks, map, score and losses against numbers of the published code, to 1e-4."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_minimaxad.anomaly_map import blur, cosine_distance, full_size_map, image_score
from anomalib_minimaxad.components import Block, UniRepLKNet
from anomalib_minimaxad.loss import MiniMaxAdLoss, contraction_threshold, training_map
from anomalib_minimaxad.torch_model import Bottleneck, Decoder, MiniMaxAdModel, Pyramids
from anomalib_pack.packing import unpacked

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
CHANNELS, DEPTHS = [8, 16, 32], [2, 2, 2]  # those that the numbers were computed with

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(
        not (GOLDEN / "minimaxad_a.npz").is_file(), reason="the reference numbers of the published code are not here"
    ),
]


def read(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return read("minimaxad_a.npz")


@pytest.fixture(scope="module")
def losses() -> dict[str, torch.Tensor]:
    return read("minimaxad_loss_a.npz")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture
def encoder(golden: dict[str, torch.Tensor], tmp_path: Path) -> UniRepLKNet:
    torch.save({"models": under("state/encoder/", golden)}, tmp_path / "encoder.pth")
    network = UniRepLKNet(DEPTHS, CHANNELS[0])
    network.load_weights(tmp_path / "encoder.pth")
    return network


@pytest.fixture
def model(golden: dict[str, torch.Tensor]) -> MiniMaxAdModel:
    """The numbers' bottleneck and decoder, loaded as a published checkpoint, in place of a larger model's."""
    model = MiniMaxAdModel("unireplknet_a", weights=None)
    model.bottleneck, model.decoder = Bottleneck(CHANNELS, 2, grn=True), Decoder(CHANNELS, DEPTHS, large=True, grn=True)
    model.load_official_state_dict(
        {"bn": under("state/bottleneck/", golden), "decoder": under("state/decoder/", golden), "epoch": 160}
    )
    return model.eval()


def run_branches(network: nn.Module) -> None:
    """Let blocks run their branches, with the BatchNorms still in eval mode."""
    for module in network.modules():
        if isinstance(module, Block):
            module.training = True


@torch.no_grad()
@pytest.mark.parametrize("what", ["out", "deploy_out"])
def test_networks(
    golden: dict[str, torch.Tensor],
    encoder: UniRepLKNet,
    model: MiniMaxAdModel,
    what: str,
) -> None:
    """With branches against the published network, merged against the published merged one."""
    if what == "out":
        run_branches(encoder)
        run_branches(model)
    encoded = encoder(golden["in/image"] * encoder.std + encoder.mean)
    condensed = model.bottleneck(encoded)
    decoded = model.decoder(condensed)
    close(condensed, golden[f"{what}/bottleneck"])
    for scale in range(3):
        close(encoded[scale], golden[f"{what}/encoder{scale}"])
        close(decoded[scale], golden[f"{what}/decoder{scale}"])


@torch.no_grad()
def test_merged_parameters(golden: dict[str, torch.Tensor], encoder: UniRepLKNet, model: MiniMaxAdModel) -> None:
    for part, network in (("encoder", encoder), ("bottleneck", model.bottleneck), ("decoder", model.decoder)):
        theirs = under(f"deploy/{part}/", golden)
        for name, block in network.named_modules():
            if isinstance(block, Block):
                convolution = "dwconv.lk_origin" if f"{name}.dwconv.lk_origin.weight" in theirs else "dwconv"
                names = [f"{convolution}.weight", f"{convolution}.bias", "pwconv2.0.weight", "pwconv2.0.bias"]
                with unpacked():
                    merged = block.merged()
                for ours, end in zip(merged, names, strict=True):
                    close(ours, theirs[f"{name}.{end}"])


def pyramids(numbers: dict[str, torch.Tensor], encoded: str, decoded: str) -> Pyramids:
    return Pyramids(*([numbers[f"{name}{scale}"] for scale in range(3)] for name in (encoded, decoded)))


def full(maps: torch.Tensor) -> torch.Tensor:
    """What nearest resizing by 4 makes of a map."""
    return maps.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)


def test_map_and_score(golden: dict[str, torch.Tensor]) -> None:
    outputs = pyramids(golden, "out/encoder", "out/decoder")
    distances = [cosine_distance(*pair) for pair in zip(*outputs, strict=True)]
    for scale, distance in enumerate(distances):
        close(distance, golden[f"map/level{scale}"])
    close(full_size_map(distances, (64, 64)), golden["map/raw"])
    close(blur(golden["map/raw"], 5), golden["map/smooth"])
    close(image_score(golden["map/smooth"], 0), golden["score/max_ratio_0"])
    close(image_score(golden["map/smooth"], 0.01), golden["score/max_ratio_0.01"])
    close(full(training_map(*outputs)), golden["map/train"])
    close(MiniMaxAdLoss("global")(outputs), golden["loss/global"])


@torch.no_grad()
def test_image_to_score(golden: dict[str, torch.Tensor], encoder: UniRepLKNet, model: MiniMaxAdModel) -> None:
    model.encoder = encoder
    result = model(golden["in/image"] * encoder.std + encoder.mean)
    close(result.anomaly_map, golden["map/smooth"])
    close(result.pred_score, golden["score/max_ratio_0.01"])


@pytest.mark.parametrize("case", ["case1", "case2", "case3"])  # the first threshold of Eq. 7, and twice the second
@pytest.mark.parametrize("kind", ["adc", "global", "local", "local_hm"])
def test_losses(losses: dict[str, torch.Tensor], case: str, kind: str) -> None:
    numbers = under(f"{case}/", losses)
    outputs = pyramids(numbers, "a", "b")
    for decoded in outputs.decoded:
        decoded.grad = None
        decoded.requires_grad_()
    close(full(training_map(*outputs)), numbers["map"])
    loss = MiniMaxAdLoss(kind)(outputs)
    close(loss.detach(), numbers[kind])
    if kind == "adc":
        loss.backward()
        for scale, decoded in enumerate(outputs.decoded):
            close(decoded.grad, numbers[f"adc_grad_b{scale}"])
            assert decoded.grad.abs().max() > 1e-3  # the tolerance does not hide them


@pytest.mark.parametrize("case", ["case1", "case2", "case3"])
def test_threshold(losses: dict[str, torch.Tensor], case: str) -> None:
    numbers = under(f"{case}/", losses)
    maps = training_map(*pyramids(numbers, "a", "b"))
    threshold = contraction_threshold(maps, p_hard=0.9999, p_lim=0.9995)
    *_, used, kept = numbers["adc_parts"]
    close(threshold.detach(), used)
    assert 16 * (maps.square() >= threshold).sum() == kept
