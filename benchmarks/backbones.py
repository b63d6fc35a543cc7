"""Time of frozen backbones: folded and packed against the network as timm gives it, interleaved in one run.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --networks resnet18:layer2,layer3 --batches 1 32 --device cuda

`FrozenBackbone` runs a folded copy, on an x86 CPU from packed weights; what it takes is the column "ours". The next
columns say how many times as long the network takes as it is, with images whose channels are first or last, and a copy
that is folded, with channels last on a CPU, and not packed. The features are compared too: the largest difference from
the network's, relative to the largest value. The weights are random, with statistics under which no BatchNorm is
without effect. The times are medians; compare them by their ratios only. With one thread they are the process's own, so
that other processes disturb them less. The last columns are what the copy costs: the memory of the weights that are
there twice, without what packing pads, making the copy, and asking whether it still holds in each forward.
"""

import argparse
import time
from statistics import median

import torch
from torch import nn

from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.folding import Folding
from anomalib_pack.packing import unpacked

# Of the models' defaults, and the demo.
NETWORKS = (
    "efficientnet_b4:blocks.0,blocks.1,blocks.2,blocks.4",
    "tf_efficientnet_b4:blocks.0,blocks.1,blocks.2,blocks.4",
    "tf_efficientnet_lite0:blocks.1,blocks.2,blocks.4",
    "wide_resnet50_2:layer2,layer3",
    "vit_small_patch14_dinov2:blocks.7",
)


@torch.no_grad()
def main() -> None:
    """Print a row for each network and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME:LAYER,LAYER")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print("| network | batch | ours | as it is | as it is, channels last | folded, not packed | difference ", end="")
    print("| memory | making | asking |\n|" + 10 * "---|")
    for text in arguments.networks:
        name, layers = text.split(":")
        backbone = unsettled(FrozenBackbone(name, layers.split(","), weights=None)).to(arguments.device)
        for batch in arguments.batches:
            images = torch.rand(batch, 3, arguments.size, arguments.size, device=arguments.device)
            times, difference = measure(backbone, images, arguments)
            ratios = " | ".join(f"x {other / times[0]:.2f}" for other in times[1:])
            row = f"| {name} | {batch} | {1000 * times[0]:.1f} ms | {ratios} | {difference:.0e} |"
            print(row, costs(backbone, images), flush=True)


def unsettled(backbone: FrozenBackbone) -> FrozenBackbone:
    """Statistics of BatchNorms that are not those of a new network."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return backbone


def measure(backbone: FrozenBackbone, images: torch.Tensor, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Median seconds of each variant, and how far the copy's features are from the network's."""
    last = images.contiguous(memory_format=torch.channels_last)
    folding = Folding()  # with a copy of its own, which is not packed

    def not_packed() -> None:
        with unpacked():
            folding.run(backbone.network, images, backbone._features)

    features = backbone(images)
    expected = backbone._features(backbone.network, images)
    variants = (
        lambda: backbone(images),
        lambda: backbone._features(backbone.network, images),
        lambda: backbone._features(backbone.network, last),
        not_packed,
    )
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(arguments.repeats + 1):
        for variant, record in zip(variants, times, strict=True):
            start = now(images)
            variant()
            record.append(now(images) - start)
    difference = max((a - b).abs().max() / b.abs().max() for a, b in zip(features, expected, strict=True))
    return [median(record[1:]) for record in times], float(difference)  # without the warm-up


def costs(backbone: FrozenBackbone, images: torch.Tensor) -> str:
    """MiB of weights that are there twice, milliseconds to make the copy, and milliseconds to find that it holds."""
    network, calls = backbone.network, 20
    packed = backbone._folding._sizes if images.device.type == "cpu" else {}
    doubled = {*packed, *(pair.convolution for pair in backbone._folding._pairs)}
    memory = sum(network.get_submodule(name).weight.nbytes for name in doubled) / 2**20

    def ask() -> None:
        backbone._folding.run(network, images, lambda *_: None)

    start = now(images)
    for _ in range(calls):
        ask()
    asking = (now(images) - start) / calls
    making = []
    for _ in range(5):
        backbone.train()
        start = now(images)
        ask()
        making.append(now(images) - start)
    return f"{memory:.0f} MiB | {1000 * median(making):.0f} ms | {1000 * asking:.2f} ms |"


def now(tensor: torch.Tensor) -> float:
    """Seconds, after all work that was given to the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.process_time() if torch.get_num_threads() == 1 and not tensor.is_cuda else time.perf_counter()


if __name__ == "__main__":
    main()
