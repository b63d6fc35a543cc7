"""Networks folded for inference: a BatchNorm becomes part of the convolution before it.

What runs where: in eval mode and without gradients a folded copy of the network, whose convolutions have the channels
last on a CPU and whose layers are packed there (see ``anomalib_pack.packing``); in training, with gradients, with
hooks, and in what compilers and exporters record, the network itself. The copy's results are the network's but for
rounding.

The copy is derived when it is needed and never stored: state dicts, checkpoints, pickles and exported files hold the
network alone. It shares with the network whatever is neither folded nor packed; other weights are there twice.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .packing import PacksItself, is_packable, pack, packs

Inputs = TypeVar("Inputs")  # a tensor or tensors
Result = TypeVar("Result")
Call = Callable[[nn.Module, Inputs], Result]
CONVOLUTIONS = (F.conv2d, F.conv_transpose2d)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)  # exactly these: others may compute something else


class Pair(NamedTuple):
    """Names of a convolution and of the BatchNorm that takes its output, as nothing else does."""

    convolution: str
    norm: str


class Copy(NamedTuple):
    """A folded network with what it was made from, by which is seen whether it still holds."""

    network: nn.Module
    tensors: list[torch.Tensor]  # kept alive with their storages, so that no others can pass for them
    storages: list[torch.UntypedStorage]
    stamps: list[int]
    packed: bool


class Folding:
    """Runs a network, or its folded copy where that may stand in for it.

    The copy is made anew when parameters, statistics or modules have changed since. Two kinds of change leave no trace:
    through ``.data``, and by fused optimizers. They are noticed if :meth:`clear` is called, or if the network has run
    in training mode or with gradients, since.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> with torch.no_grad():
        ...     Folding().run(network, torch.rand(1, 3, 16, 16), nn.Module.__call__).shape
        torch.Size([1, 8, 14, 14])
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._pairs: list[Pair] = []
        self._sizes: dict[str, torch.Size] = {}
        self._copy: Copy | None = None

    def run(self, network: nn.Module, inputs: Inputs, call: Call[Inputs, Result]) -> Result:
        """Run a network, always the same one.

        Args:
            network: The network.
            inputs: Images or features, (B, ...), or several tensors of this kind.
            call: What to do with the network, or its copy, and the inputs.

        Returns:
            What ``call`` returns.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return call(network, inputs)
        modules = all_modules(network)
        if torch.is_grad_enabled() or any(module.training for module in modules):
            self.clear()
            return call(network, inputs)
        if has_hooks(modules):
            return call(network, inputs)  # hooks see what each module itself gives
        return call(self._folded(network, modules, inputs, call), inputs)

    def clear(self) -> None:
        """Forget the copy."""
        self._copy = None

    def _folded(self, network: nn.Module, modules: list[nn.Module], inputs: Any, call: Call) -> nn.Module:
        if modules != self._modules:
            calls = watch(lambda: call(network, tree_map(lambda tensor: tensor[:1], inputs)))
            self._pairs, self._sizes = find_pairs(network, calls), find_sizes(network, calls)
            self._modules, self._copy = modules, None
        tensors = [
            tensor
            for module in modules
            for group in (module._parameters, module._buffers)
            for tensor in group.values()
            if tensor is not None
        ]
        packed = bool(self._sizes) and packs(network.get_submodule(next(iter(self._sizes))).weight)
        now = stamps(tensors)
        if now is None or not (packed or self._pairs):
            return network
        if self._copy is None or self._copy.stamps != now or self._copy.packed != packed:
            # Outside inference mode, whose tensors do not count changes.
            with torch.inference_mode(mode=False), torch.no_grad():
                folded = self._copy.network if self._shares(tensors, packed) else sharing_copy(network, tensors)
                for pair in self._pairs:
                    fold(network, folded, pair)
                if packed:
                    pack_layers(folded, self._sizes, {pair.convolution for pair in self._pairs})
            storages = [tensor.untyped_storage() for tensor in tensors]
            self._copy = Copy(folded, tensors, storages, now, packed)
        return self._copy.network

    def _shares(self, tensors: list[torch.Tensor], packed: bool) -> bool:
        """Whether there is such a copy with these very tensors, and only their values have changed."""
        copied = self._copy
        return copied is not None and copied.packed == packed and all(map(operator.is_, tensors, copied.tensors))

    def __reduce__(self) -> tuple[type[Folding], tuple[()]]:
        """Copied and pickled without the folded network, which is made again when it is needed."""
        return Folding, ()


def all_modules(network: nn.Module) -> list[nn.Module]:
    """All modules of a network, in a fifth of the time of ``network.modules()``, which each call would wait for."""
    found = [network]
    for module in found:  # which grows
        found += [child for child in module._modules.values() if child is not None]
    return found


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody sees what one of these modules takes or gives."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


FunctionCall = tuple[Callable, list[torch.Tensor], Any]  # function, tensors it takes, and result


class Observer(TorchFunctionMode):
    """Records calls of functions that give tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[FunctionCall] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _tensors(result):
            self.calls.append((func, _tensors((args, kwargs)), result))
        return result


class Calls(NamedTuple):
    """What a network did."""

    calls: list[FunctionCall]
    results: list[torch.Tensor]


def watch(run: Callable[[], Any]) -> Calls:
    """Run a network, in eval mode, and watch it."""
    with Observer() as observer:
        results = run()
    return Calls(observer.calls, _tensors(results))


def find_pairs(network: nn.Module, watched: Calls) -> list[Pair]:
    """Find what can be folded.

    Whatever a network is made of, a pair is a convolution with a parameter as its kernel, once, whose result a
    BatchNorm takes, and nobody else.
    """
    taken = [tensor for _, inputs, _ in watched.calls for tensor in inputs] + watched.results
    uses = Counter(map(id, taken))
    convolutions, norms = {}, {}  # names by tensors
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            convolutions[id(module._parameters.get("weight"))] = name
        elif type(module) in NORMS:
            norms[id(module.running_mean)] = name
    made_by, pairs = {}, []  # convolutions by their results
    for function, inputs, result in watched.calls:
        if function in CONVOLUTIONS:
            weight = inputs[1]
            if id(weight) in convolutions and uses[id(weight)] == 1:
                made_by[id(result)] = convolutions[id(weight)]
        elif function is F.batch_norm and len(inputs) > 1:
            maps, mean = inputs[:2]
            if id(maps) in made_by and uses[id(maps)] == 1 and id(mean) in norms and uses[id(mean)] == 1:
                pairs.append(Pair(made_by[id(maps)], norms[id(mean)]))
    return pairs


def find_sizes(network: nn.Module, watched: Calls) -> dict[str, torch.Size]:
    """Find the layers that can be packed, by their names, and the sizes of their inputs."""
    names = {id(layer.weight): name for name, layer in network.named_modules() if is_packable(layer)}
    return {
        names[id(inputs[1])]: inputs[0].shape
        for function, inputs, _ in watched.calls
        if function in (*CONVOLUTIONS, F.linear) and id(inputs[1]) in names
    }


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def sharing_copy(network: nn.Module, tensors: list[torch.Tensor]) -> nn.Module:
    """Copy a network's modules, not these tensors."""
    # In eval mode again: copied graphs of torch.fx are in training mode.
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}).eval()


def fold(network: nn.Module, folded: nn.Module, pair: Pair) -> None:
    """Put a pair of a network, in one convolution, into its copy.

    With half precision, too, this is done in float32 and then rounded.
    """
    convolution, norm = network.get_submodule(pair.convolution), network.get_submodule(pair.norm)
    weight = convolution.weight
    precision = torch.promote_types(weight.dtype, torch.float32)
    scale = (norm.running_var.to(precision) + norm.eps).rsqrt()
    bias = -norm.running_mean.to(precision)
    if convolution.bias is not None:
        bias = bias + convolution.bias.to(precision)
    if norm.affine:
        scale = scale * norm.weight.to(precision)
    bias = bias * scale
    if norm.affine:
        bias = bias + norm.bias.to(precision)
    shape = [1, 1, 1, 1]
    shape[1 if isinstance(convolution, nn.ConvTranspose2d) else 0] = -1
    kernel = (weight.to(precision) * scale.view(shape)).to(weight.dtype)

    target = folded.get_submodule(pair.convolution)
    target.weight = nn.Parameter(kernel.contiguous(memory_format=fast_layout(kernel)), requires_grad=False)
    target.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    behind = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()  # it drops in training only
    folded.set_submodule(pair.norm, behind)


def pack_layers(folded: nn.Module, sizes: dict[str, torch.Size], own: set[str]) -> None:
    """Pack layers of a copy, for inputs of these sizes; of its own ones nothing else is kept."""
    for name, size in sizes.items():
        layer = folded.get_submodule(name)
        if packs(layer.weight):
            pack(layer, size)
            if name in own:
                layer.weight = None
    parts: Iterator[object] = folded.modules()  # of a Module a type checker knows no attribute
    for part in parts:
        if isinstance(part, PacksItself):
            part.pack_weights()


def fast_layout(tensor: torch.Tensor) -> torch.memory_format:
    """Memory layout of kernels, which maps follow: on a CPU channels last (benchmarks/backbones.py), else as ever."""
    return torch.channels_last if tensor.device.type == "cpu" else torch.contiguous_format


def in_fast_layout(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) with the channels last on a CPU, and so the maps behind them; compilers see no difference."""
    if images.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return images
    return images.contiguous(memory_format=torch.channels_last)


def stamps(tensors: list[torch.Tensor]) -> list[int] | None:
    """Numbers that change whenever a tensor is replaced, written to or given another storage.

    Returns:
        ``None`` for tensors that were made in inference mode, which do not count changes.
    """
    try:
        changes = [tensor._version for tensor in tensors]
    except RuntimeError:
        return None
    return changes + [id(tensor) for tensor in tensors] + [tensor.data_ptr() for tensor in tensors]
