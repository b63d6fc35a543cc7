"""Blocks of MiniMaxAD's encoder, bottleneck and decoder: those of UniRepLKNet (Sec. 3.2 and 3.3, Fig. 3a).

Status: exact to the published code, merged or not. Parameters have its names.

In training a block runs its branches. In eval mode it runs a merged copy of itself, with the same outputs (to 1e-4) in
a fraction of the time: the branches become one depthwise convolution, BatchNorms, layer scale and GRN's shift become
part of the layer before or behind them. Without gradients, on x86 CPUs, the linear layers are packed as well, see
``anomalib_pack.packing``, unless somebody watches one by a hook. Hooks of merged layers are called in training only.

Shapes: B images, C channels, h x w locations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.folding import Folding, has_hooks, stamps
from anomalib_pack.packing import linear_add, linear_gelu, pack_matrix, packs

LARGE_KERNEL = 13  # Sec. 3.3; the small kernel is 3
# Kernel size and dilation of the branches beside a 13 x 13 kernel; UniRepLKNet's published table.
DILATED_BRANCHES = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
EXPANSION = 4  # of the channels between the two linear layers
SQUEEZE = 4  # by which squeeze-and-excitation divides the channels
LAYER_SCALE = 1e-6  # at the start of the training
SQUARES = 2**20  # so many at once stay in a CPU's cache


class FoldedSequential(nn.Sequential):
    """Layers that run folded and packed where nobody needs a gradient, see ``anomalib_pack.folding``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._folding = Folding()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Run the layers."""
        return self._folding.run(self, maps, nn.Sequential.forward)

    def train(self, mode: bool = True) -> FoldedSequential:
        """Switch; the folded copy is made anew."""
        self._folding.clear()
        return super().train(mode)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each location of maps (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)  # published code

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, h, w)."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """GRN: lets channels compete by their strength over the whole map (Eqs. 4 and 5).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def scaled(self, maps: torch.Tensor) -> torch.Tensor:
        """Eq. 5 without beta: (B, h, w, C) -> (B, h, w, C)."""
        return self._factors(torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True)) * maps

    def scale_(self, maps: torch.Tensor) -> torch.Tensor:
        """:meth:`scaled` in place, without a gradient, in a fraction of the time on a CPU."""
        rows = maps.flatten(1, 2)
        parts = rows.split(max(1, SQUARES // (rows.shape[0] * rows.shape[2])), dim=1)
        squares = torch.stack([part.square().sum(dim=1) for part in parts]).sum(dim=0)  # (B, C)
        return maps.mul_(self._factors(squares.sqrt()[:, None, None]))

    def _factors(self, strength: torch.Tensor) -> torch.Tensor:
        """Factors by g_x, both (B, 1, 1, C)."""
        relative = strength / (strength.mean(dim=3, keepdim=True) + 1e-6)  # n_x, Eq. 4; published epsilon
        return self.gamma * relative + 1

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Normalise (B, h, w, C)."""
        return self.scaled(maps) + self.beta  # Eq. 5


class SqueezeExcitation(nn.Module):
    """Weighs channels by a small network on their means.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // SQUEEZE, kernel_size=1)
        self.up = nn.Conv2d(channels // SQUEEZE, channels, kernel_size=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        weights = self.up(F.relu(self.down(maps.mean(dim=(2, 3), keepdim=True))))  # (B, C, 1, 1)
        return maps * weights.sigmoid()


class DilatedBranches(nn.Module):
    """Depthwise 13 x 13 convolution beside five small dilated ones, each with a BatchNorm; the sum of all.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lk_origin = depthwise(channels, LARGE_KERNEL)
        self.origin_bn = nn.BatchNorm2d(channels)
        for size, dilation in DILATED_BRANCHES:
            self.add_module(f"dil_conv_k{size}_{dilation}", depthwise(channels, size, dilation))
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    def branches(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """All convolutions with their norms."""
        yield self.lk_origin, self.origin_bn
        for size, dilation in DILATED_BRANCHES:
            yield getattr(self, f"dil_conv_k{size}_{dilation}"), getattr(self, f"dil_bn_k{size}_{dilation}")

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return sum(norm(convolution(maps)) for convolution, norm in self.branches())  # pyrefly: ignore [bad-return]


def depthwise(channels: int, size: int, dilation: int = 1) -> nn.Conv2d:
    """Depthwise convolution that keeps the grid, without bias."""
    padding = dilation * (size - 1) // 2
    return nn.Conv2d(channels, channels, size, padding=padding, dilation=dilation, groups=channels, bias=False)


def dense_kernel(convolution: nn.Conv2d, size: int) -> torch.Tensor:
    """Kernel (C, 1, size, size) that does what a smaller dilated one does: with zeros between its values."""
    channels, _, extent, _ = convolution.weight.shape
    dilation = convolution.dilation[0]
    covered = dilation * (extent - 1) + 1  # pixels from the first to the last value
    margin = (size - covered) // 2
    kernel = convolution.weight.new_zeros(channels, 1, size, size)
    kernel[:, :, margin : margin + covered : dilation, margin : margin + covered : dilation] = convolution.weight
    return kernel


def affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) that a BatchNorm applies in eval mode."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - scale * norm.running_mean


def merge_depthwise(dwconv: nn.Conv2d | DilatedBranches, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel (C, 1, k, k) and bias (C,) for a depthwise convolution or several, and the BatchNorm behind them."""
    if isinstance(dwconv, DilatedBranches):
        kernel, bias = 0, 0
        for convolution, branch_norm in dwconv.branches():
            scale, shift = affine(branch_norm)
            kernel = kernel + scale.view(-1, 1, 1, 1) * dense_kernel(convolution, LARGE_KERNEL)
            bias = bias + shift
    else:
        kernel, bias = dwconv.weight, 0
    scale, shift = affine(norm)
    return scale.view(-1, 1, 1, 1) * kernel, scale * bias + shift


def merge_linear(
    linear: nn.Linear, norm: nn.BatchNorm2d, layer_scale: torch.Tensor, grn: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C, 4C) and bias (C,) of a linear layer with GRN's beta before it, BatchNorm and layer scale behind it."""
    scale, shift = affine(norm)
    bias = shift
    if isinstance(grn, GlobalResponseNorm):
        # Not as a matrix product, which autocast would round: what is merged under it may be used without it later.
        bias = bias + scale * (linear.weight * grn.beta.flatten()).sum(dim=1)
    return (layer_scale * scale).unsqueeze(1) * linear.weight, layer_scale * bias


class Merged(NamedTuple):
    """Parameters of a merged block."""

    kernel: torch.Tensor  # (C, 1, k, k)
    kernel_bias: torch.Tensor  # (C,)
    weight: torch.Tensor  # (C, 4C)
    bias: torch.Tensor  # (C,)


class Packed(NamedTuple):
    """Parameters of a merged block whose linear layers are packed."""

    kernel: torch.Tensor  # (C, 1, k, k)
    kernel_bias: torch.Tensor  # (C,)
    first_weight: torch.Tensor  # (4C, C)
    weight: torch.Tensor  # (C, 4C)
    bias: torch.Tensor  # (C,)


class Cache(NamedTuple):
    """A merged block with what it was made from, by which is seen whether it still holds."""

    merged: Merged  # also what exporters record
    packed: Packed | None  # once it was needed
    tensors: list[torch.Tensor]  # kept alive, so that no other tensor can pass for one of them
    stamps: list[int]


class Block(nn.Module):
    """LarK block (13 x 13, with dilated branches) or SmaK block (3 x 3) of Fig. 3a.

    Depthwise convolution, BatchNorm, squeeze-and-excitation, linear layer to 4 C, GELU, GRN, linear layer back to C,
    BatchNorm, layer scale, and the input added.

    Args:
        channels: C.
        large: 13 x 13 kernel.
        grn: With GRN (Table 5).
    """

    def __init__(self, channels: int, large: bool, grn: bool) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.dwconv = DilatedBranches(channels) if large else depthwise(channels, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels)
        self.pwconv1 = nn.Sequential(ToChannelsLast(), nn.Linear(channels, hidden))
        self.act = nn.Sequential(nn.GELU(), GlobalResponseNorm(hidden) if grn else nn.Identity())
        self.pwconv2 = nn.Sequential(
            nn.Linear(hidden, channels, bias=False), ToChannelsFirst(), nn.BatchNorm2d(channels)
        )
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self._cache: Cache | None = None
        # Module.parameters() would take most of the time of the check.
        self._parts = [part for part in self.modules() if part._parameters]

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        maps = maps.contiguous(memory_format=fast_layout(maps))
        if self.training:
            return maps + self._branched(maps)
        merged = self.merged()
        return self._packed(maps, merged) if isinstance(merged, Packed) else maps + self._merged(maps, merged)

    def _branched(self, maps: torch.Tensor) -> torch.Tensor:
        hidden = self.se(self.norm(self.dwconv(maps)))
        return self.gamma.view(1, -1, 1, 1) * self.pwconv2(self.act(self.pwconv1(hidden)))

    def _merged(self, maps: torch.Tensor, merged: Merged) -> torch.Tensor:
        gelu, grn = self.act
        hidden = gelu(self.pwconv1(self.se(convolve(maps, merged))))  # (B, h, w, 4C)
        if isinstance(grn, GlobalResponseNorm):
            hidden = grn.scaled(hidden)
        return F.linear(hidden, merged.weight, merged.bias).permute(0, 3, 1, 2)

    def _packed(self, maps: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Run with the input added; without a new tensor of 4C channels at each step, which a CPU waits for."""
        to_rows, first = self.pwconv1
        hidden = linear_gelu(to_rows(self.se(convolve(maps, packed))), packed.first_weight, first.bias)
        grn = self.act[1]
        if isinstance(grn, GlobalResponseNorm):
            hidden = grn.scale_(hidden)
        return linear_add(hidden, packed.weight, packed.bias, to_rows(maps)).permute(0, 3, 1, 2)

    def merged(self) -> Merged | Packed:
        """Merge the block, or return what was merged before if no parameter and no statistic has changed since.

        An exported program keeps what the block is when it is exported. A compiled or traced one merges in each call,
        because it cannot see changes.
        """
        if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
            return self._merge()
        if torch.compiler.is_compiling():  # the module has an exporter's stand-ins now; the cache has the tensors
            holds = self._cache is not None and stamps(self._cache.tensors) == self._cache.stamps
            return self._cache.merged if holds else self._merge()
        groups = [group for part in self._parts for group in (part._parameters, part._buffers)]
        tensors = [tensor for group in groups for tensor in group.values() if tensor is not None]
        left_out = (self.pwconv1, *self.pwconv1, self.act[0])  # what a merged block calls, and a packed one does not
        packed = not torch.is_grad_enabled() and packs(self.gamma) and not has_hooks(left_out)
        now = stamps(tensors)
        held = self._cache
        if held is None or now is None or held.stamps != now:
            # Outside inference mode, whose tensors could not take part in a backward pass to the features later.
            with torch.inference_mode(mode=False), torch.no_grad():
                held = Cache(self._merge(), None, tensors, now or [])
        if packed and held.packed is None:
            held = held._replace(packed=self._pack(held.merged))
        if now is not None:
            self._cache = held
        return held.packed if packed and held.packed is not None else held.merged

    def _merge(self) -> Merged:
        linear, _, norm = self.pwconv2
        return Merged(*merge_depthwise(self.dwconv, self.norm), *merge_linear(linear, norm, self.gamma, self.act[1]))

    def _pack(self, merged: Merged) -> Packed:
        first = pack_matrix(self.pwconv1[1].weight)
        return Packed(merged.kernel, merged.kernel_bias, first, pack_matrix(merged.weight), merged.bias)

    def train(self, mode: bool = True) -> Block:
        """Switch between branches and merged copy, which a training makes stale."""
        if mode != self.training:
            # Also frees its memory, and notices what leaves no stamp: changes through `.data` and by fused optimizers.
            self._cache = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> Block:
        """Move to another device or precision; there and back may end at the same address with other values."""
        self._cache = None
        return super()._apply(*arguments, **keywords)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        """Load; an exporter would not see that ``assign=True`` has replaced tensors."""
        self._cache = None
        super()._load_from_state_dict(*arguments, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # made again when needed


def convolve(maps: torch.Tensor, merged: Merged | Packed) -> torch.Tensor:
    """Depthwise convolution of a merged block, (B, C, h, w) -> (B, C, h, w)."""
    padding = merged.kernel.shape[2] // 2
    return F.conv2d(maps, merged.kernel, merged.kernel_bias, padding=padding, groups=maps.shape[1])


def fast_layout(maps: torch.Tensor) -> torch.memory_format:
    """Memory layout for depthwise convolutions.

    On a CPU a 13 x 13 one is about ten times faster with the channels last. Elsewhere it is the published code's.
    """
    return torch.channels_last if maps.device.type == "cpu" else torch.contiguous_format


class ToChannelsLast(nn.Module):
    """(B, C, h, w) -> (B, h, w, C)."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Permute."""
        return maps.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(B, h, w, C) -> (B, C, h, w)."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Permute."""
        return maps.permute(0, 3, 1, 2)
