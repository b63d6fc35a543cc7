"""Time of frozen backbones: folded against the network as timm gives it, interleaved in one run.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --networks resnet18:layer2,layer3 --batches 1 32 --device cuda

`FrozenBackbone` runs a folded copy, on a CPU with the channels last. The other columns say how many times as long the
network takes as it is, with the channels first or last, and the copy with the channels first. The features are compared
too: the largest difference from the network's, relative to the largest value. The weights are random, with statistics
under which no BatchNorm is without effect. The times are medians; compare them by their ratios only. With one thread
they are the process's own, so that other processes disturb them less. The last columns are what the copy costs: what it
adds to the memory, making it, and asking whether it still holds in each forward.
"""

import argparse
import time
from statistics import median

import torch
from torch import nn

from anomalib_pack import folding
from anomalib_pack.backbones import FrozenBackbone

# Of the models' defaults, and the demo.
NETWORKS = (
    "efficientnet_b4:blocks.0,blocks.1,blocks.2,blocks.4",
    "tf_efficientnet_b4:blocks.0,blocks.1,blocks.2,blocks.4",
    "tf_efficientnet_lite0:blocks.1,blocks.2,blocks.4",
    "wide_resnet50_2:layer2,layer3",
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
    print(
        "| network | batch | folded | as it is | as it is, channels last | folded, channels first | difference ", end=""
    )
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
    """Median seconds of each variant, and how far the folded network's features are from the network's."""
    last = images.contiguous(memory_format=torch.channels_last)
    copies = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        default, folding.fast_layout = folding.fast_layout, lambda _kernel, layout=layout: layout
        backbone.train()
        backbone(images)
        copies[layout] = backbone._folding._copy.network
        folding.fast_layout = default
    backbone.train()
    features = backbone(images)
    expected = backbone._features(backbone.network, images)
    variants = (
        lambda: backbone(images),
        lambda: backbone._features(backbone.network, images),
        lambda: backbone._features(backbone.network, last),
        lambda: backbone._features(copies[torch.contiguous_format], images),
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
    """MiB that the copy adds, milliseconds to make it, and milliseconds to find that it still holds."""
    own = set(backbone.parameters())
    added = [p for p in backbone._folding._copy.network.parameters() if p not in own]
    network, calls = backbone.network, 20

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
    memory = sum(p.numel() * p.element_size() for p in added) / 2**20
    return f"{memory:.0f} MiB | {1000 * median(making):.0f} ms | {1000 * asking:.2f} ms |"


def now(tensor: torch.Tensor) -> float:
    """Seconds, after all work that was given to the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.process_time() if torch.get_num_threads() == 1 and not tensor.is_cuda else time.perf_counter()


if __name__ == "__main__":
    main()
