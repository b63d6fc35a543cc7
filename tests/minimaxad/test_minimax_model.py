"""What is MiniMaxAd's own: merging, switches, weights of the encoder, schedule, checks."""

import copy
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import nn
from watch import Watch

from anomalib_minimaxad import MiniMaxAd
from anomalib_minimaxad.components import Block, UniRepLKNet
from anomalib_minimaxad.components.blocks import Packed
from anomalib_minimaxad.components.encoder import VARIANTS
from anomalib_minimaxad.loss import MiniMaxAdLoss
from anomalib_minimaxad.torch_model import Bottleneck, Decoder, MiniMaxAdModel
from anomalib_pack.data import MVTecLoco
from anomalib_pack.packing import packs, unpacked

SMALL = {"encoder": "unireplknet_a", "weights": None}
needs_packing = pytest.mark.skipif(not packs(torch.ones(1)), reason="needs oneDNN on an x86 processor")


def network(**arguments) -> MiniMaxAdModel:
    torch.manual_seed(0)
    return MiniMaxAdModel(**(SMALL | arguments))


def tiny() -> MiniMaxAdModel:
    """Networks of a few channels, all of whose parameters and statistics are random."""
    model = network()
    model.encoder = UniRepLKNet((1, 1, 2), 8)
    model.bottleneck = Bottleneck([8, 16, 32], 1, grn=True)
    model.decoder = Decoder([8, 16, 32], (1, 1, 2), large=True, grn=True)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def images(count: int = 2, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@torch.no_grad()
def never_merged(model: MiniMaxAdModel, batch: torch.Tensor) -> torch.Tensor:
    """Anomaly map by a copy that runs its branches."""
    other = copy.deepcopy(model).eval()
    for block in blocks(other):
        block.training = True  # without its BatchNorms
    anomaly_map = other(batch).anomaly_map
    assert all(block._cache is None for block in blocks(other))
    return anomaly_map


@torch.no_grad()
def agrees(model: MiniMaxAdModel) -> None:
    torch.testing.assert_close(model(images()).anomaly_map, never_merged(model, images()), atol=1e-5, rtol=0)


def train(model: MiniMaxAdModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for _ in range(steps):
        loss = MiniMaxAdLoss()(model(images()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_training_with_validations_is_training_without() -> None:
    """Train, validate, train on: the same weights as without validations, and each validation sees the newest."""
    states = []
    for validate in (True, False):
        torch.manual_seed(0)
        model = tiny()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            train(model, optimizer, steps=2)
            if validate:
                model.eval()
                with torch.inference_mode():  # as Lightning does
                    seen = model(images()).anomaly_map
                torch.testing.assert_close(seen, never_merged(model, images()), atol=1e-5, rtol=0)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


class ComparesWithBranches(Callback):
    """Compares the merged network with its branches at each validation, and each validation with the one before."""

    def __init__(self) -> None:
        self.maps = []

    def on_validation_batch_end(self, _trainer, pl_module, *_) -> None:
        with torch.inference_mode(mode=False):
            agrees(pl_module.model)
            self.maps.append(pl_module.model(images()).anomaly_map.detach())


def test_validations_of_a_training_run_the_newest_network(loco: MVTecLoco, tmp_path: Path) -> None:
    """Lightning goes back to training without a call of `train`."""
    compares = ComparesWithBranches()
    fit(loco, tmp_path, [compares], max_epochs=3, limit_train_batches=2, limit_val_batches=1)
    assert len(compares.maps) == 3
    assert all(not torch.allclose(*pair, atol=1e-4) for pair in pairwise(compares.maps))


def step(block: Block) -> None:
    """One of an optimizer, without a switch to training mode."""
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(block.parameters(), lr=0.1).step()


CHANGES = {
    "optimizer": step,
    "in place": lambda block: block.pwconv2[0].weight.mul_(2),
    "statistics": lambda block: block.norm.running_mean.add_(1),
    "layer scale": lambda block: block.gamma.mul_(2),
    "GRN": lambda block: block.act[1].beta.add_(1),
    "other data": lambda block: setattr(block.pwconv2[0].weight, "data", 2 * block.pwconv2[0].weight.data),
    "other parameter": lambda block: setattr(block.norm, "weight", nn.Parameter(2 * block.norm.weight)),
    "loaded": lambda block: block.load_state_dict({k: 2 * v for k, v in block.state_dict().items()}),
    "assigned": lambda block: block.load_state_dict({k: 2 * v for k, v in block.state_dict().items()}, assign=True),
}


@torch.no_grad()
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("part", ["encoder", "bottleneck", "decoder"])
def test_changes_in_eval_mode_are_noticed(change: str, part: str) -> None:
    model = tiny().eval()
    before = model(images()).anomaly_map
    for block in blocks(getattr(model, part)):
        CHANGES[change](block)
    agrees(model)
    assert not torch.allclose(model(images()).anomaly_map, before, atol=1e-4)


@torch.no_grad()
def test_changes_through_data_are_noticed_at_a_switch() -> None:
    """Averaging callbacks swap weights that way between two validations."""
    model = tiny().eval()
    model(images())
    model.train().eval()
    for parameter in (*model.bottleneck.parameters(), *model.decoder.parameters()):
        parameter.data.mul_(1.5)
    agrees(model)


@torch.no_grad()
def test_merged_once() -> None:
    """Not again while nothing changes; the frozen encoder not even by a training."""
    model = tiny().eval()
    model(images())
    first = [block.merged() for block in blocks(model)]
    model(images(3))
    assert all(block.merged() is merged for block, merged in zip(blocks(model), first, strict=True))
    encoder = [block.merged() for block in blocks(model.encoder)]
    with torch.enable_grad():
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), steps=1)
    assert all(block._cache is None for block in blocks(model.decoder))  # a training keeps no second copy
    assert all(block.merged() is merged for block, merged in zip(blocks(model.encoder), encoder, strict=True))


@torch.no_grad()
def test_merged_network_in_other_hands() -> None:
    """Copied, pickled without its merged copy, moved to another precision, built or called in inference mode."""
    model = tiny().eval()
    expected = model(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    assert all(block._cache is None for block in blocks(pickled))
    for other in (copy.deepcopy(model), pickled):
        torch.testing.assert_close(other(images()).anomaly_map, expected.anomaly_map, atol=0, rtol=0)
    for precision, tolerance in ((torch.double, 1e-5), (torch.half, 5e-3), (torch.bfloat16, 5e-2)):
        other = copy.deepcopy(model)
        other(images())
        moved = other.to(precision)(images().to(precision)).anomaly_map
        torch.testing.assert_close(moved.float(), expected.anomaly_map, atol=tolerance, rtol=0)
    with torch.inference_mode():
        built = tiny().eval()
        torch.testing.assert_close(built(images()).anomaly_map, tiny().eval()(images()).anomaly_map)


@torch.no_grad()
def test_copies_change_alone() -> None:
    model = tiny().eval()
    expected = model(images()).anomaly_map
    other = copy.deepcopy(model)
    other(images())
    for block in blocks(other.decoder):
        block.gamma.mul_(2)
    agrees(other)
    assert not torch.allclose(other(images()).anomaly_map, expected, atol=1e-4)
    torch.testing.assert_close(model(images()).anomaly_map, expected, atol=0, rtol=0)


@torch.no_grad()
def test_nothing_is_merged_in_half_precision_by_autocast() -> None:
    """What is merged under it is used without it too."""
    model = tiny().eval()
    with unpacked():
        expected = [block.merged() for block in blocks(copy.deepcopy(model))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = [block.merged() for block in blocks(model)]
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)


@torch.no_grad()
def test_moving_frees_the_merged_copy() -> None:
    """There and back may end at the same address with other values."""
    model = tiny().eval()
    model(images())
    model.half().float()
    assert all(block._cache is None for block in blocks(model))
    agrees(model)


def test_gradient_reaches_the_features_after_inference_mode() -> None:
    """That of the branches, though what the blocks held gives none."""
    gradients = []
    for merged in (True, False):
        model = tiny().eval()
        with torch.inference_mode():
            model(images())
        for block in blocks(model):
            block.training = not merged  # without its BatchNorms
        features = [maps.requires_grad_() for maps in model.encoder(images())]
        model.decoder(model.bottleneck(features))[0].square().sum().backward()
        gradients.append([maps.grad for maps in features])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("grn", [True, False])
def test_packed_block(large: bool, grn: bool) -> None:
    """Packed where it can be; the same results, also where maps are zero, have one location or another layout."""
    torch.manual_seed(0)
    block = Block(8, large, grn)
    for tensor in block.state_dict().values():
        tensor.add_(torch.rand(tensor.shape).to(tensor.dtype))
    block.eval()
    maps = torch.randn(3, 8, 8, 40)
    for given in (maps, maps[:1, :, ::2], maps[:, :, :1, :1], maps.transpose(2, 3), 0 * maps, 1e-30 * maps):
        before = given.clone()
        with unpacked():
            expected = block(given)
            assert not isinstance(block.merged(), Packed)
        torch.testing.assert_close(block(given), expected, atol=1e-5, rtol=1e-5)
        assert isinstance(block.merged(), Packed)
        assert torch.equal(given, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = block(maps)
        with unpacked():
            torch.testing.assert_close(ours, block(maps), atol=0, rtol=0)


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("part", ["pwconv1", "pwconv1.1", "act.0"])
def test_watched_layers_are_called(part: str) -> None:
    block, maps, seen = Block(8, large=True, grn=True).eval(), torch.randn(1, 8, 8, 8), []
    handle = block.get_submodule(part).register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    expected = block(maps)
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(block(maps), expected, atol=1e-5, rtol=1e-5)
    assert len(seen) == 1


@needs_packing
@torch.no_grad()
def test_strength_of_large_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """GRN squares them part by part."""
    block = tiny().eval().decoder.stages[1][0]
    maps = torch.randn(2, 16, 5, 7)
    expected = block(maps)
    for number in (1, 200, 1000):
        monkeypatch.setattr("anomalib_minimaxad.components.blocks.SQUARES", number)
        torch.testing.assert_close(block(maps), expected, atol=1e-5, rtol=1e-5)


def test_state_does_not_change_with_merging() -> None:
    model = tiny().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(images())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_exported_program_is_the_merged_network() -> None:
    model = tiny().eval()
    expected = model(images()).anomaly_map
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()).anomaly_map, expected, atol=1e-5, rtol=0)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in str(node.target) for node in calls) == 3  # of the bottleneck's convolutions
    groups = [node.args[6] for node in calls if "conv2d" in str(node.target) and len(node.args) == 7]
    assert len([number for number in groups if number > 1]) == len(blocks(model))  # one depthwise convolution in each
    assert not any("mkldnn" in str(node.target) or "sqrt" in str(node.target) for node in calls)  # nothing is merged
    tensors = [*program.state_dict.values(), *program.constants.values()]
    assert not any(tensor.is_mkldnn for tensor in tensors)


@torch.no_grad()
def test_traced_program_is_not_packed() -> None:
    model = tiny().eval()
    condensed = model.bottleneck(model.encoder(images()))
    part = nn.Sequential(model.decoder.upsample_layers[0], model.decoder.stages[2])
    expected = part(condensed)
    program = torch.jit.trace(part, condensed)
    assert "mkldnn" not in str(program.inlined_graph)
    torch.testing.assert_close(program(condensed), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", ["statistics", "loaded", "assigned"])
@pytest.mark.parametrize("way", ["exported", "compiled"])
def test_changes_before_other_programs_are_noticed(change: str, way: str) -> None:
    """Without a forward pass in between, when the copy in memory is that of the former block."""
    block = tiny().eval().decoder.stages[1][0]
    maps = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    program = torch.compile(block, backend="eager")
    before = block(maps)
    if way == "compiled":
        torch.testing.assert_close(program(maps), before, atol=1e-5, rtol=0)
    CHANGES[change](block)
    if way == "exported":
        program = torch.export.export(block, (maps,)).module()
    after = program(maps)
    torch.testing.assert_close(after, maps + block._branched(maps), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_size_of_the_default_network() -> None:
    """Sec. 3.3: features of 80, 160 and 320 channels; Table 6: 33.1 M parameters merged, less the unused stage 4."""
    model = MiniMaxAdModel(weights=None).eval()
    assert model.encoder.channels == [80, 160, 320]
    grids = [(tuple(maps.shape[1:])) for maps in model.encoder(images(1))]
    assert grids == [(80, 16, 16), (160, 8, 8), (320, 4, 4)]
    assert [len(stage) for stage in model.decoder.stages] == [2, 2, 8]
    merged_away = sum(p.numel() for block in blocks(model) for p in (*block.dwconv.parameters(), block.gamma))
    merged_away += sum(p.numel() for block in blocks(model) for norm in norms(block) for p in norm.parameters())
    merged_away += sum(block.act[1].beta.numel() + block.pwconv2[0].weight.numel() for block in blocks(model))
    merged = sum(tensor.numel() for block in blocks(model) for tensor in block.merged())
    count = sum(parameter.numel() for parameter in model.parameters()) - merged_away + merged
    assert count == pytest.approx(33.1e6 - 1.85e6, abs=0.1e6)


def norms(block: Block) -> list[nn.BatchNorm2d]:
    return [block.norm, block.pwconv2[2]]


def test_initialisation() -> None:
    """Layer scale 1e-6, GRN at identity, convolutions kaiming normal by their outputs."""
    model = network()
    for block in blocks(model):
        assert (block.gamma == 1e-6).all()
        assert not block.act[1].gamma.any()
        assert not block.act[1].beta.any()
    weight = model.bottleneck.conv4.weight  # (320, 480, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (320 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "arguments",
    [
        {"variant": "fp"},
        {"loss": "local"},
        {"loss": "local_hm"},
        {"variant": "fp", "loss": "adc"},
        {"grn": False},
        {"encoder_block": "small"},
        {"decoder_block": "small"},
        {"encoder_block": "small", "decoder_block": "small", "grn": False},
        {"encoder": "unireplknet_f"},
        {"encoder": "timm:resnet18"},
    ],
    ids=str,
)
def test_switches(arguments: dict) -> None:
    """Each ablation trains every parameter that it has, and its merged network agrees with its branches."""
    torch.manual_seed(0)
    model = MiniMaxAd(**(SMALL | arguments))
    model.loss(model.model.train()(images())).backward()
    for name, parameter in model.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    agrees(model.model.eval())


def test_switches_do_what_they_say() -> None:
    def kernels(model: nn.Module) -> set[int]:
        return {block.merged().kernel.shape[2] for block in blocks(model)}

    model = network(encoder_block="small", grn=False)
    assert kernels(model.encoder) == kernels(model.bottleneck) == {3}
    assert kernels(model.decoder) == {3, 13}
    assert not any("act.1" in name for name, _ in model.named_parameters())
    model = network(decoder_block="small")
    assert kernels(model.encoder) == {3, 13}
    assert kernels(model.decoder) == {3}
    assert MiniMaxAd(**SMALL).loss.kind == "adc"
    assert MiniMaxAd(**SMALL, variant="fp").loss.kind == "global"
    assert MiniMaxAd(**SMALL, variant="fp", loss="local_hm", p_lim=0.9).loss.p_lim == 0.9
    with pytest.raises(ValueError, match=r"encoder_block .*timm"):
        network(encoder="timm:resnet18", encoder_block="small")


def test_tiny_variant_alternates() -> None:
    """UniRepLKNet-T: every other block of the third stage has a 3 x 3 kernel."""
    variant = VARIANTS["unireplknet_t"]
    with torch.device("meta"):
        encoder = UniRepLKNet(variant.depths, variant.width, alternating=variant.alternating)
    sizes = [[isinstance(block.dwconv, nn.Conv2d) for block in stage] for stage in encoder.stages]
    assert sizes == [3 * [True], 3 * [False], 9 * [False, True]]


def published_file(encoder: UniRepLKNet) -> dict[str, torch.Tensor]:
    """A trained classifier as on the hub: with fourth stage and head, without norms of the outputs."""
    torch.manual_seed(1)
    state = {name: 0.1 * torch.rand_like(tensor.float()) for name, tensor in encoder.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("norm0.", "norm1.", "norm2."))}
    unused = (
        "downsample_layers.3.0.weight",
        "stages.3.0.gamma",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    )
    return state | {name: torch.rand(3) for name in unused}


@pytest.mark.parametrize(
    ("suffix", "wrapper"), [(".pth", None), (".pth", "model"), (".pth", "models"), (".safetensors", None)]
)
def test_local_weights(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    """The published loader loads nothing from a file that is wrapped in `model`."""
    encoder = network().encoder
    state, file = published_file(encoder), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({wrapper: state, "epoch": 299} if wrapper else state, file)
    encoder.load_weights(file)
    for name, tensor in encoder.state_dict().items():
        if name.startswith(("norm0.", "norm1.", "norm2.")):
            assert (tensor == (1 if name.endswith("weight") else 0)).all(), name
        else:
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def test_report_of_what_does_not_fit(tmp_path: Path) -> None:
    encoder = network().encoder
    state = published_file(encoder)
    del state["stages.1.0.dwconv.lk_origin.weight"]
    state["stages.1.0.dwconv.lk_origin.bias"] = torch.zeros(1)
    state["stages.0.0.gamma"] = torch.zeros(3)
    before = encoder.stages[0][0].gamma.clone()
    torch.save(state, tmp_path / "other.pth")
    message = r"Missing: stages\.1\.0\.dwconv\.lk_origin\.weight; unexpected: .*bias; other shape: stages\.0\.0\.gamma"
    with pytest.raises(ValueError, match=message):
        encoder.load_weights(tmp_path / "other.pth")
    assert torch.equal(encoder.stages[0][0].gamma, before)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        encoder.load_weights(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="wheel"):
        encoder.load_weights("wheel")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published file in the hub client's cache is found offline; without it the message says what else there is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    encoder = network().encoder
    with pytest.raises(ConnectionError, match=r"unireplknet_a_in1k_224_acc77\.03\.pth .*timm:tf_efficientnet_lite0"):
        encoder.load_weights("hub")
    snapshot = tmp_path / "models--DingXiaoH--UniRepLKNet" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    reference = snapshot.parents[1] / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(snapshot.name)
    state = published_file(encoder)
    torch.save(state, snapshot / "unireplknet_a_in1k_224_acc77.03.pth")
    encoder.load_weights("hub")
    name = "stages.2.5.dwconv.dil_conv_k7_2.weight"
    assert torch.equal(encoder.state_dict()[name], state[name])
    with pytest.raises(ValueError, match="grn=True"):
        network(grn=False).encoder.load_weights("hub")


def test_timm_encoder(tmp_path: Path) -> None:
    """The last layer of each stride, normalised over the channels; weights as of every backbone."""
    model = network(encoder="timm:tf_efficientnet_lite0")
    assert model.encoder.channels == [24, 40, 112]
    assert model.bottleneck.conv4.weight.shape[:2] == (224, 3 * 112)
    torch.manual_seed(1)
    full = timm.create_model("tf_efficientnet_lite0").eval()
    torch.save(full.state_dict(), tmp_path / "weights.pth")
    model.encoder.load_weights(tmp_path / "weights.pth")
    with torch.no_grad():
        expected = full.forward_intermediates(2 * images() - 1, indices=(1, 2, 3), intermediates_only=True)
        features = model.encoder(images())
    for ours, theirs in zip(features, expected, strict=True):
        mean, variance = theirs.mean(dim=1, keepdim=True), theirs.var(dim=1, keepdim=True, correction=0)
        torch.testing.assert_close(ours, (theirs - mean) / (variance + 1e-6).sqrt(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"encoder .*timm:no_such"):
        network(encoder="timm:no_such_network")
    with pytest.raises(ValueError, match=r"encoder .*strides.*vit_tiny"):
        network(encoder="timm:vit_tiny_patch16_224")


def test_half_precision_does_not_merge_scores() -> None:
    model = tiny().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(images())
    assert result.anomaly_map.dtype == result.pred_score.dtype == torch.float32
    assert result.anomaly_map.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MiniMaxAdLoss()(model.train()(images()))
    assert loss.dtype == torch.float32


def test_official_names_with_another_shape() -> None:
    model = network()
    state = {"bn": model.bottleneck.state_dict(), "decoder": model.decoder.state_dict()}
    model.load_official_state_dict(state)
    with pytest.raises(ValueError, match=r"Bottleneck.*bn1\.bias \(80,\) instead of \(96,\)"):
        network(encoder="unireplknet_f").load_official_state_dict(state)
    with pytest.raises(ValueError, match=r"Decoder.*unexpected: .*act\.1\.beta"):
        MiniMaxAdModel.load_official_state_dict(without_grn(model), state)
    with pytest.raises(ValueError, match=r"checkpoint must be .*'decoder'"):
        model.load_official_state_dict({"bn": state["bn"]})


def without_grn(model: MiniMaxAdModel) -> MiniMaxAdModel:
    other = network(grn=False)
    other.bottleneck = model.bottleneck
    return other


def test_normalisation_is_the_encoders() -> None:
    """Images with another network's statistics would be normalised twice."""
    from anomalib.models import Patchcore

    with pytest.raises(ValueError, match="Normalize"):
        MiniMaxAd(**SMALL, pre_processor=Patchcore.configure_pre_processor((256, 256)))


class StopAtOnce(Callback):
    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = True


def fit(loco: MVTecLoco, root: Path, callbacks: Sequence[Callback] = (), **trainer) -> tuple[Watch, MiniMaxAd]:
    watch = Watch()
    torch.manual_seed(0)
    model = MiniMaxAd(**SMALL, pre_processor=MiniMaxAd.configure_pre_processor((64, 64)))
    model.model = tiny()
    engine = Engine(
        default_root_dir=root, accelerator="cpu", callbacks=[watch, *callbacks], enable_progress_bar=False,
        enable_model_summary=False, logger=False, **trainer,
    )  # fmt: skip
    engine.fit(model, datamodule=loco)
    return watch, model


def test_schedule(loco: MVTecLoco, tmp_path: Path) -> None:
    """Sec. 4.1: the rate decays after each epoch; validations are spread, and the last epoch has one."""
    watch, model = fit(loco, tmp_path, max_epochs=45, limit_train_batches=1, limit_val_batches=1)
    torch.testing.assert_close(watch.rates, [5e-3 * 0.995**epoch for epoch in range(45)])
    assert watch.validated == [*range(1, 44, 2), 44]
    group = model.trainer.optimizers[0].param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 5e-5)
    agrees(model.model.eval())


def test_length_of_training(loco: MVTecLoco, tmp_path: Path) -> None:
    """The paper's 160 epochs unless the user says otherwise."""
    lengths = [
        fit(loco, tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[StopAtOnce()], **arguments)[0].epochs
        for arguments in ({}, {"max_epochs": 7})
    ]
    assert lengths == [160, 7]


def test_training_on_local_weights(loco: MVTecLoco, tmp_path: Path) -> None:
    """Loaded when training starts; the checkpoint carries them and says where they came from."""
    arguments = {"encoder": "unireplknet_a", "pre_processor": MiniMaxAd.configure_pre_processor((64, 64))}
    state = published_file(network().encoder)
    torch.save(state, tmp_path / "weights.pth")
    engine = Engine(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, enable_progress_bar=False, logger=False,
        limit_train_batches=1,
    )  # fmt: skip
    engine.fit(MiniMaxAd(weights=tmp_path / "weights.pth", **arguments), datamodule=loco)
    restored = MiniMaxAd.load_from_checkpoint(engine.best_model_path, weights_only=True, **arguments)
    assert restored.hparams["weights"] == str(tmp_path / "weights.pth")
    for name, tensor in restored.model.encoder.state_dict().items():
        if not name.startswith(("norm0.", "norm1.", "norm2.")):
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def test_restored_model_trains_with_its_branches(loco: MVTecLoco, tmp_path: Path) -> None:
    _, model = fit(loco, tmp_path, max_epochs=1, limit_train_batches=1)
    before = model.model.decoder.stages[2][0].dwconv.origin_bn.running_mean.clone()
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, enable_progress_bar=False, logger=False)
    engine.fit(model.eval(), datamodule=loco)
    assert not torch.equal(model.model.decoder.stages[2][0].dwconv.origin_bn.running_mean, before)
