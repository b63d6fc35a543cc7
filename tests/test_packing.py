"""Packed layers: the same results but for rounding."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from anomalib_pack import packing
from anomalib_pack.efficiency.complexity import flops, profiler_flops
from anomalib_pack.folding import Folding
from anomalib_pack.packing import Linear, is_packable, linear, pack, pack_matrix, packs, product, unpacked

MAPS = torch.rand(2, 12, 17, 20, generator=torch.Generator().manual_seed(0)) - 0.5
needs_packing = pytest.mark.skipif(not packs(MAPS), reason="needs oneDNN on an x86 processor")


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        partial(nn.Conv2d, 12, 8, 3),
        partial(nn.Conv2d, 12, 24, (1, 5), stride=2, padding=(0, 2), dilation=(1, 2), groups=4),
        partial(nn.Conv2d, 12, 12, 13, padding=6, groups=12),
        partial(Conv2dSame, 12, 8, 3, stride=2),
        partial(Conv2dSame, 12, 12, 5, stride=2, groups=12),
        partial(nn.ConvTranspose2d, 12, 8, 2, stride=2),
        partial(nn.ConvTranspose2d, 12, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        partial(nn.Linear, 20, 7),
        partial(Linear, 20, 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_of_the_layer(kind: Callable[..., nn.Module], bias: bool, layout: torch.memory_format) -> None:
    """Also for inputs of another size than that for which the layer is packed."""
    torch.manual_seed(0)
    layer = kind(bias=bias)
    packed = copy.deepcopy(layer)
    assert is_packable(packed)
    pack(packed, (1, *MAPS.shape[1:]))
    for maps in (MAPS, MAPS[:1], MAPS[:, :, :14], MAPS.repeat(3, 1, 4, 1)):
        given = maps.contiguous(memory_format=layout)
        torch.testing.assert_close(packed(given), layer(maps), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 3, 3, padding_mode="reflect", padding=1), nn.Conv2d(3, 3, 3, padding="same"), nn.Conv1d(3, 3, 3)],
    ids=str,
)
def test_layers_that_are_left(layer: nn.Module) -> None:
    assert not is_packable(layer)


@needs_packing
@torch.no_grad()
def test_matrix() -> None:
    weight, bias = MAPS[0, :, 0], MAPS[0, :, 1, 0]
    expected = nn.functional.linear(MAPS, weight, bias)
    torch.testing.assert_close(linear(MAPS, pack_matrix(weight), bias), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(linear(MAPS, weight, bias), expected, atol=0, rtol=0)


@needs_packing
def test_products_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed for neither few rows nor few columns, nor where gradients or a program's record are wanted."""
    calls = []
    monkeypatch.setattr(packing, "pack_matrix", lambda matrix: calls.append(matrix) or pack_matrix(matrix))
    rows, matrix = torch.rand(4, 10, 50), torch.rand(50, 60)
    expected = rows @ matrix
    torch.testing.assert_close(product(rows, matrix), expected, atol=2e-5, rtol=1e-5)
    assert len(calls) == 1
    torch.testing.assert_close(product(rows[0], matrix), expected[0])
    torch.testing.assert_close(product(rows, matrix[:, :31]), expected[..., :31])
    with unpacked():
        torch.testing.assert_close(product(rows, matrix), expected)
    rows.requires_grad_()
    product(rows, matrix).sum().backward()
    torch.testing.assert_close(rows.grad, matrix.sum(dim=1).expand_as(rows))
    program = torch.export.export(Product(), (rows.detach(), matrix))
    assert all("mkldnn" not in str(node.target) for node in program.graph.nodes)
    assert len(calls) == 1


class Product(nn.Module):
    def forward(self, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return product(rows, matrix)


def onednns(result: torch.Tensor) -> bool:
    """Whether a result of ``linear`` is oneDNN's, with gradients."""
    function = result.grad_fn
    return function is not None and "OnednnLinear" in str(function.next_functions[0][0])


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [5, 20, 70])
@pytest.mark.parametrize("rows", [MAPS, MAPS.mT.contiguous().mT, MAPS[0, 0, 0], MAPS[:, :1].expand(MAPS.shape)])
def test_products_and_gradients(rows: torch.Tensor, channels: int, bias: bool) -> None:
    """Those of ``F.linear`` in double precision, also second ones and those of a result that is written to."""
    torch.manual_seed(0)
    inputs = [rows, torch.randn(3, channels, 20)[1], torch.randn(channels, 2)[:, 0]][: 2 + bias]

    def run(function: Callable, precision: torch.dtype) -> list[torch.Tensor]:
        given = [tensor.to(precision).detach().requires_grad_() for tensor in inputs]
        result = function(*given)
        assert onednns(result) == (function is linear)
        result = nn.functional.relu(result, inplace=True)
        once = torch.autograd.grad(result.square().sum() + result.sum(), given, create_graph=True)
        twice = torch.autograd.grad(once[0].square().sum() + once[1].sum(), given[:2])
        return [result, *once, *twice]

    for ours, expected in zip(run(linear, torch.float), run(nn.functional.linear, torch.double), strict=True):
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=0)


@needs_packing
def test_where_products_are_onednns() -> None:
    """In float32 with gradients, and of these only what is needed."""
    layer = Linear(20, 7)
    assert onednns(layer(MAPS))
    assert not onednns(copy.deepcopy(layer).double()(MAPS.double()))
    assert not onednns(copy.deepcopy(layer).requires_grad_(False)(MAPS))
    with unpacked():
        assert not onednns(layer(MAPS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(MAPS).dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(layer(MAPS), nn.functional.linear(MAPS, layer.weight, layer.bias), atol=0, rtol=0)
    program = torch.export.export(layer, (MAPS,))
    assert "mkldnn" not in str(program.graph)
    layer.requires_grad_(False)
    maps = MAPS.clone().requires_grad_()
    layer(maps).sum().backward()
    torch.testing.assert_close(maps.grad, layer.weight.sum(0).expand_as(maps), atol=1e-5, rtol=1e-5)


class Network(nn.Module):
    """Layers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(36, 5)
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.layers(maps)


def packed_layers(folding: Folding) -> int:
    """How many layers of a copy have another ``forward`` than their class."""
    assert folding._copy is not None
    return sum("forward" in vars(module) for module in folding._copy.network.modules())


@needs_packing
@torch.no_grad()
def test_which_copies_are_packed() -> None:
    """None in a precision that is not float32, also where that is autocast's; the copy is made anew in between."""
    torch.manual_seed(0)
    network, folding = Network().eval(), Folding()

    def run(network: nn.Module, maps: torch.Tensor = MAPS) -> torch.Tensor:
        return folding.run(network, maps, nn.Module.__call__)

    expected = network(MAPS)
    for _ in range(2):
        torch.testing.assert_close(run(network), expected, atol=1e-5, rtol=1e-5)
        assert packed_layers(folding) == 3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run(network).dtype == torch.bfloat16
        assert packed_layers(folding) == 0
        with unpacked():
            torch.testing.assert_close(run(network), expected, atol=1e-5, rtol=1e-5)
        assert packed_layers(folding) == 0
    run(network.double(), MAPS.double())
    assert packed_layers(folding) == 0


@needs_packing
@torch.no_grad()
def test_never_stale() -> None:
    torch.manual_seed(0)
    network, folding = Network().eval(), Folding()
    for parameter in network.parameters():
        before = folding.run(network, MAPS, nn.Module.__call__)
        parameter.add_(0.1)
        after = folding.run(network, MAPS, nn.Module.__call__)
        torch.testing.assert_close(after, network(MAPS), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
def test_operations_are_counted() -> None:
    network, folding = Network().eval(), Folding()

    def run(maps: torch.Tensor) -> torch.Tensor:
        return folding.run(network, maps, nn.Module.__call__)

    assert flops(run, MAPS) == flops(network, MAPS) > 0
    assert profiler_flops(run, MAPS) > 0
