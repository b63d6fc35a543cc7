"""Compare timm's EfficientNet-b4 with that of UniAD's published code, as far as that goes without its weights.

    pip install efficientnet_pytorch==0.7.1
    python benchmarks/uniad_backbone.py

The published code holds a copy of that package. The same random weights go into all networks, tensor by tensor in the
order in which they stand, and the features of stages 1 to 5 are compared: the largest difference, relative to the
largest value. The published code builds the network for 380 x 380 pixels, and its padding stays that of this size.
"""

import timm
import torch
from efficientnet_pytorch import EfficientNet
from torch import nn

STAGES = (1, 5, 9, 21, 31)  # last blocks of the stages, published code
IMAGE_SIZE = 224
BUILT_FOR = 380


@torch.no_grad()
def main() -> None:
    """Print a row for each network beside the published one."""
    torch.manual_seed(0)
    networks = {name: timm.create_model(name).eval() for name in ("tf_efficientnet_b4.aa_in1k", "efficientnet_b4")}
    weights = random_weights(networks["tf_efficientnet_b4.aa_in1k"])
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    print("| network | tensors | parameters | padding of | stage 1 | 2 | 3 | 4 | 5 |\n|" + 9 * "---|")
    for size in (IMAGE_SIZE, BUILT_FOR):
        published = fill(EfficientNet.from_name("efficientnet-b4", image_size=size).eval(), weights)
        theirs = stages(published, images)
        for name, network in networks.items():
            ours = fill(network, weights).forward_intermediates(images, intermediates_only=True)
            cells = [f"{(a - b).abs().max() / b.abs().max():.1e}" for a, b in zip(ours, theirs, strict=True)]
            parameters = sum(parameter.numel() for parameter in network.parameters())
            print(f"| {name} | {len(network.state_dict())} | {parameters} | {size} px | {' | '.join(cells)} |")


def random_weights(network: nn.Module) -> list[torch.Tensor]:
    """Weights under which no BatchNorm is without effect."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    return [tensor.clone() for tensor in network.state_dict().values()]


def fill(network: nn.Module, weights: list[torch.Tensor]) -> nn.Module:
    """Load the weights by their order; a tensor of another shape is an error."""
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    return network


def stages(network: EfficientNet, images: torch.Tensor) -> list[torch.Tensor]:
    """Features behind the stages."""
    maps, found = network._swish(network._bn0(network._conv_stem(images))), []
    for index, block in enumerate(network._blocks):
        maps = block(maps)
        if index in STAGES:
            found.append(maps)
    return found


if __name__ == "__main__":
    main()
