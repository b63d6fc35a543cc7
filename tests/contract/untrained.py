"""What untrained networks need to run: a memory bank, penalty images."""

from collections.abc import Iterator

import torch
from anomalib.models import AnomalibModule

ENTRIES = 50  # of a memory bank


def fill_banks(model: AnomalibModule) -> None:
    """Give Unislad memory banks and distributions of random numbers, on whatever device new tensors are."""
    network = model.model
    sides = (network.aggregator.dimension, network.vit.channels[0], network.vit.channels[0])
    for bank, dimension in zip((network.local_bank, network.global_bank, network.class_bank), sides, strict=True):
        bank.neighbors.bank = torch.randn(ENTRIES, dimension)
    for distribution in (network.local_distribution, network.global_distribution, network.class_distribution):
        distribution.directions = torch.eye(ENTRIES, len(distribution.mean))
        distribution.variances = torch.ones(ENTRIES)


def give_penalty_images(model: AnomalibModule) -> None:
    """Give DistilledEfficientAd noise as penalty images, on the device of its networks."""

    size = tuple(model.input_size)

    def noise() -> Iterator[tuple[torch.Tensor]]:
        while True:
            yield (torch.rand(1, 3, *size, device=next(model.parameters()).device),)

    model.imagenet_iterator = noise()
