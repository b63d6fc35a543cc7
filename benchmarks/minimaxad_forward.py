"""Forward time of MiniMaxAd: packed against not, merged against branches, and both layouts, interleaved in one run.

    python benchmarks/minimaxad_forward.py
    python benchmarks/minimaxad_forward.py --device cuda

Eval mode runs merged blocks, on an x86 CPU packed with the channels last and elsewhere with the channels first. All
variants give the same anomaly maps, which is checked. The times are medians; compare them by their ratios only. The
last table is what asking for the merged network costs in each forward while nothing changes, and what merging costs
after a change.
"""

import argparse
import time
from contextlib import nullcontext
from statistics import median

import torch
from torch import nn

from anomalib_minimaxad.components import Block, blocks
from anomalib_minimaxad.torch_model import MiniMaxAdModel
from anomalib_pack.packing import unpacked

# Packed or not, merged or branches, and the layout.
VARIANTS = {
    "packed, channels last": (nullcontext, True, torch.channels_last),
    "merged, channels last": (unpacked, True, torch.channels_last),
    "merged, channels first": (unpacked, True, torch.contiguous_format),
    "branches, channels last": (unpacked, False, torch.channels_last),
    "branches, channels first": (unpacked, False, torch.contiguous_format),
}


def main() -> None:
    """Measure all variants at batch 1 and 16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", default="unireplknet_n")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = MiniMaxAdModel(arguments.encoder, weights=None).eval().to(arguments.device)
    print(f"| batch | {' | '.join(VARIANTS)} |\n|---|{len(VARIANTS) * '---|'}")
    for batch in arguments.batches:
        images = torch.rand(batch, 3, arguments.size, arguments.size, device=arguments.device)
        times = measure(model, images, arguments.repeats)
        ratios = " | ".join(f"x {other / times[0]:.2f}" for other in times[1:])
        print(f"| {batch} | {1000 * times[0]:.1f} ms | {ratios} |")
    print(f"\n| asking | merging |\n|---|---|\n| {asking(model):.2f} ms | {merging(model):.2f} ms |")


@torch.no_grad()
def measure(model: MiniMaxAdModel, images: torch.Tensor, repeats: int) -> list[float]:
    """Median seconds of each variant."""
    times: list[list[float]] = [[] for _ in VARIANTS]
    expected = model(images).anomaly_map
    default = blocks.fast_layout
    for _ in range(repeats + 1):
        for (packing, merged, layout), record in zip(VARIANTS.values(), times, strict=True):
            blocks.fast_layout = lambda _maps, layout=layout: layout
            for block in all_blocks(model):
                block.training = not merged  # its BatchNorms stay in eval mode
            with packing():
                model(images[:1])  # merges and packs what is not there
                start = now(images)
                result = model(images)
                record.append(now(images) - start)
            torch.testing.assert_close(result.anomaly_map, expected, atol=1e-4, rtol=0)
    blocks.fast_layout = default
    for block in all_blocks(model):
        block.training = False
    return [median(record[1:]) for record in times]  # without the warm-up


@torch.no_grad()
def asking(model: nn.Module) -> float:
    """Milliseconds for all blocks to find that what they merged still holds."""
    for block in all_blocks(model):
        block.merged()
    start = time.perf_counter()
    for _ in range(100):
        for block in all_blocks(model):
            block.merged()
    return 10 * (time.perf_counter() - start)


@torch.no_grad()
def merging(model: nn.Module) -> float:
    """Milliseconds to merge all blocks, and to pack them where they are."""
    times = []
    for _ in range(5):
        model.train().eval()
        for block in model.encoder.modules():
            if isinstance(block, Block):
                block._cache = None  # a frozen encoder keeps it
        start = now(next(model.parameters()))
        for block in all_blocks(model):
            block.merged()
        times.append(now(next(model.parameters())) - start)
    return 1000 * median(times)


def all_blocks(model: nn.Module) -> list[Block]:
    """All blocks of encoder, bottleneck and decoder."""
    return [module for module in model.modules() if isinstance(module, Block)]


def now(tensor: torch.Tensor) -> float:
    """Seconds, after all work that was given to the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
