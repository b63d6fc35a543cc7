"""Folded copies: the network's results, never stale, never stored."""

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.folding import Folding, find_pairs, watch

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5  # of the largest value


def unsettle(network: nn.Module) -> nn.Module:
    """Statistics and parameters under which no BatchNorm is without effect."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return network


def backbone_of(name: str, layers: tuple[str, ...]) -> FrozenBackbone:
    torch.manual_seed(0)
    return unsettle(FrozenBackbone(name, layers, None))


@torch.no_grad()
def as_it_is(backbone: FrozenBackbone) -> list[torch.Tensor]:
    return backbone._features(backbone.network, IMAGES)


def agrees(backbone: FrozenBackbone) -> None:
    """Features are those of the network as it is now, and come from a copy in which no BatchNorm is left."""
    for ours, expected in zip(backbone(IMAGES), as_it_is(backbone), strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE * expected.abs().max().item(), rtol=0)
    assert norms(backbone.network) > 0
    assert norms(backbone._folding._copy.network) == 0


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ("layer1", "layer3")),
        ("wide_resnet50_2", ("layer1.1", "layer2.0.conv2", "layer2.1")),  # a convolution's own result is a feature
        ("efficientnet_b0", ("blocks.0", "blocks.4")),  # BatchNorm and activation are one module
        ("tf_efficientnet_lite0", ("blocks.1.1", "blocks.2.1")),  # the same in a graph; padding is a module's own
        ("mobilenetv3_small_100", ("blocks.1", "blocks.3")),
        ("densenet121", ("features.denseblock1", "features.denseblock2")),  # BatchNorm before convolutions
        ("regnety_002", ("s1", "s3")),
        ("repvgg_a0", ("stages.0", "stages.2")),  # BatchNorm without convolution
        ("convnext_atto", ("stages.0", "stages.1")),  # nothing to fold
        ("vit_tiny_patch16_224", ("blocks.0", "blocks.2")),  # the same
        ("nf_resnet50", ("stages.0", "stages.1")),  # kernels that are computed; nothing to fold
    ],
    ids=str,
)
def test_features_of_the_network(name: str, layers: tuple[str, ...]) -> None:
    backbone = backbone_of(name, layers)
    for ours, expected in zip(backbone(IMAGES), as_it_is(backbone), strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("name", "layers", "left"),
    [
        ("resnet18", ("layer4",), 0),
        ("tf_efficientnet_b4", ("blocks.4",), 0),
        ("tf_efficientnet_lite0", ("blocks.4",), 0),
        ("tf_efficientnet_lite0", ("blocks.4.1",), 0),
        ("wide_resnet50_2", ("layer2.0.conv2", "layer2.1"), 1),
    ],
    ids=str,
)
def test_all_that_can_be_is_folded(name: str, layers: tuple[str, ...], left: int) -> None:
    backbone = backbone_of(name, layers)
    backbone(IMAGES)
    assert norms(backbone._folding._copy.network) == left


class Odd(nn.Module):
    """What must not be folded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        result = self.first(maps)
        if self.kind == "two readers":
            return self.norm(result) + result
        if self.kind == "in between":
            return self.norm(result.relu_())
        if self.kind == "convolution twice":
            return self.norm(result) + self.other(self.first(maps.flip(3)))
        if self.kind == "norm twice":
            return self.norm(result) + self.norm(self.second(maps))
        if self.kind == "view":
            return self.norm(result) + result.flatten(1).sum()
        return self.norm(result)


@pytest.mark.parametrize("kind", ["two readers", "in between", "convolution twice", "norm twice", "view", "a pair"])
@torch.no_grad()
def test_what_must_not_be_folded(kind: str) -> None:
    torch.manual_seed(0)
    network = unsettle(Odd(kind)).eval()
    assert len(find_pairs(network, watch(lambda: network(IMAGES)))) == (kind == "a pair")
    torch.testing.assert_close(Folding().run(network, IMAGES, nn.Module.__call__), network(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d])
@pytest.mark.parametrize(
    "convolution",
    [
        partial(nn.Conv2d, stride=2),
        partial(nn.Conv2d, groups=3, padding=1, dilation=2),
        partial(nn.Conv2d, padding=1, padding_mode="reflect"),
        partial(nn.ConvTranspose2d, stride=2, padding=1),
    ],
)
def test_kinds_of_pairs(convolution: Callable, norm: type[nn.Module], affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(convolution(3, 6, kernel_size=3, bias=bias), norm(6, eps=1e-3, affine=affine))
    network = unsettle(network).eval()
    folding = Folding()
    torch.testing.assert_close(folding.run(network, IMAGES, nn.Module.__call__), network(IMAGES), atol=1e-5, rtol=1e-5)
    assert folding._copy is not None


def seeded(seed: int) -> FrozenBackbone:
    torch.manual_seed(seed)
    return unsettle(FrozenBackbone("resnet18", ("layer1", "layer2"), None))


def load(backbone: FrozenBackbone, assign: bool) -> None:
    backbone.load_state_dict(seeded(1).state_dict(), assign=assign)


def write(backbone: FrozenBackbone) -> None:
    for tensor in backbone.network.layer1.state_dict().values():
        tensor.mul_(2)


def write_statistics(backbone: FrozenBackbone) -> None:
    backbone.network.bn1.running_var.fill_(3)


def replace_norm(backbone: FrozenBackbone) -> None:
    backbone.network.bn1 = nn.BatchNorm2d(64).eval()


def replace_activation(backbone: FrozenBackbone) -> None:
    backbone.network.act1 = nn.GELU().eval()


def round_values(backbone: FrozenBackbone) -> None:
    backbone.network.to(torch.bfloat16).float()  # may end at the same addresses


def write_data(backbone: FrozenBackbone) -> None:
    for parameter in backbone.parameters():
        parameter.data.mul_(1.1)
    backbone.train()


def replace_data(backbone: FrozenBackbone) -> None:
    values = nn.utils.parameters_to_vector(backbone.parameters())
    nn.utils.vector_to_parameters(1.1 * values, backbone.parameters())


@pytest.mark.parametrize(
    "change",
    [
        partial(load, assign=False),
        partial(load, assign=True),
        write,
        write_statistics,
        replace_norm,
        replace_activation,
        round_values,
        write_data,
        replace_data,
    ],
)
@torch.no_grad()
def test_never_stale(change: Callable[[FrozenBackbone], None]) -> None:
    backbone = seeded(0)
    before = backbone(IMAGES)
    change(backbone)
    agrees(backbone)
    assert not torch.allclose(backbone(IMAGES)[0], before[0], atol=1e-4)


@torch.no_grad()
def test_folded_once() -> None:
    """Not again while nothing changes; where only values change (as DDP writes statistics), by the same modules."""
    backbone = seeded(0)
    backbone(IMAGES)
    first = backbone._folding._copy
    backbone(IMAGES[:1])
    assert backbone._folding._copy is first
    write(backbone)
    agrees(backbone)
    assert backbone._folding._copy.network is first.network


@torch.no_grad()
def test_what_is_not_folded_is_shared() -> None:
    backbone = backbone_of("efficientnet_b0", ("blocks.2",))
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone(IMAGES)
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())
    folded = dict(backbone._folding._copy.network.named_parameters())
    own = {name for name, parameter in backbone.network.named_parameters() if folded.get(name) is not parameter}
    assert {name for name in folded if ".se." in name}.isdisjoint(own)
    assert not any(parameter.requires_grad for parameter in folded.values())


@torch.no_grad()
def test_in_other_hands() -> None:
    """Copied, pickled without the folded network, moved to another precision, built or called in inference mode."""
    backbone = seeded(0)
    expected = backbone(IMAGES)
    file = io.BytesIO()
    torch.save(backbone, file)
    assert len(file.getvalue()) < 1.1 * sum(4 * tensor.numel() for tensor in backbone.state_dict().values())
    file.seek(0)
    for other in (copy.deepcopy(backbone), torch.load(file, weights_only=False)):
        assert other._folding._copy is None
        torch.testing.assert_close(other(IMAGES), expected, atol=0, rtol=0)
        write(other)
        agrees(other)
    torch.testing.assert_close(backbone(IMAGES), expected, atol=0, rtol=0)  # copies change alone
    for precision, tolerance in ((torch.double, 1e-5), (torch.half, 1e-2), (torch.bfloat16, 5e-2)):
        moved = copy.deepcopy(backbone).to(precision)(IMAGES.to(precision))[0]
        assert moved.dtype == precision
        torch.testing.assert_close(moved.to(torch.float32), expected[0], atol=tolerance * expected[0].max(), rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(IMAGES), expected, atol=0, rtol=0)
        built = seeded(0)  # its tensors do not count changes: it runs as it is
        torch.testing.assert_close(built(IMAGES), as_it_is(built), atol=0, rtol=0)
        torch.testing.assert_close(seeded(1)(IMAGES), as_it_is(seeded(1)), atol=0, rtol=0)


def test_folded_in_inference_mode_and_used_with_gradients() -> None:
    """A head on frozen features is trained after a prediction."""
    backbone = seeded(0)
    with torch.inference_mode():
        backbone(IMAGES)
    head = nn.Conv2d(64, 1, 1)
    head(backbone(IMAGES)[0]).sum().backward()
    assert head.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_nothing_is_folded_in_half_precision_by_autocast() -> None:
    """What is folded under it is used without it too."""
    backbone, other = seeded(0), seeded(0)
    backbone(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other(IMAGES)
    torch.testing.assert_close(other(IMAGES), backbone(IMAGES), atol=0, rtol=0)


@torch.no_grad()
def test_hooks_see_the_modules_of_the_network() -> None:
    backbone = seeded(0)
    backbone(IMAGES)
    seen = []
    handle = backbone.network.layer1[0].bn1.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    torch.testing.assert_close(backbone(IMAGES), as_it_is(backbone), atol=0, rtol=0)
    assert len(seen) == 2
    handle.remove()
    agrees(backbone)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_exporters_record_the_network_as_it_is() -> None:
    """Also after it has been folded."""
    backbone = seeded(0)
    backbone(IMAGES)
    program = torch.export.export(backbone, (IMAGES,), strict=False)
    operations = [str(node.target) for node in program.graph.nodes]
    assert sum("batch_norm" in operation for operation in operations) == norms(backbone.network)
    assert set(program.state_dict) <= set(backbone.state_dict()) | {"mean", "std"}
    torch.testing.assert_close(program.module()(IMAGES), as_it_is(backbone), atol=1e-5, rtol=1e-5)
    traced = torch.jit.trace(backbone, IMAGES, check_trace=False)
    assert str(traced.inlined_graph).count("aten::batch_norm") == norms(backbone.network)


@torch.no_grad()
def test_compiled() -> None:
    """Without a break, and never stale."""
    backbone = seeded(0)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), as_it_is(backbone), atol=1e-5, rtol=1e-5)
    write(backbone)
    torch.testing.assert_close(compiled(IMAGES), as_it_is(backbone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)])
def test_network_that_is_trained_between(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """In training it is itself and keeps no copy; fused optimizers leave no trace of their steps."""
    torch.manual_seed(0)
    network, folding = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), Folding()
    steps = optimizer(network.parameters(), lr=0.1)

    def check() -> torch.Tensor:
        network.eval()
        with torch.no_grad():
            result = folding.run(network, IMAGES, nn.Module.__call__)
            torch.testing.assert_close(result, network(IMAGES), atol=1e-5, rtol=1e-5)
        assert folding._copy is not None
        return result

    before = check()
    folding.run(network.train(), IMAGES, nn.Module.__call__).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert folding._copy is None
    steps.step()
    assert not torch.allclose(check(), before, atol=1e-3)
    folding.run(network, IMAGES, nn.Module.__call__).sum().backward()  # in eval mode with gradients
    steps.step()
    check()
