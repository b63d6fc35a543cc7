"""Time of a training step of Uniad's reconstruction network, features given, against PyTorch's own attention.

    python benchmarks/uniad_training_step.py

On a CPU dropout of attention weights has no fused kernel, PyTorch's draws take longer than the products, and those of
linear layers are MKL's. Ours is compared, interleaved in one run, with the same network whose linear layers are
computed by `F.linear`, and with PyTorch's modules, as in the published code: `nn.MultiheadAttention`, `nn.Dropout` and
`nn.Linear`. All have the same weights and, without dropout, give the same reconstruction, which is checked. The times
are medians of forward, backward and AdamW; compare them by their ratios only. With one thread they are the process's
own, so that other processes disturb them less.
"""

import argparse
import copy
import time
from contextlib import nullcontext
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.packing import unpacked
from anomalib_uniad.components.attention import Attention
from anomalib_uniad.torch_model import FeatureReconstruction, UniadModel


class PublishedAttention(nn.Module):
    """PyTorch's attention with the arguments of ours."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        channels = attention.in_proj_weight.shape[1]
        self.inner = nn.MultiheadAttention(channels, attention.heads, attention.dropout, batch_first=True)
        self.inner.load_state_dict(attention.state_dict())

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend; weights are returned too, as by default."""
        return self.inner(query.expand_as(key), key, value, attn_mask=mask)[0]


def main() -> None:
    """Print a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    ours = UniadModel(weights=None).reconstruction.train()
    theirs = published(ours)
    print("| batch | ours | with F.linear | with PyTorch's modules |\n|---|---|---|---|")
    for batch in arguments.batches:
        features = torch.randn(batch, ours.input_proj.in_features, *ours.grid)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(features), theirs.eval()(features), atol=1e-4, rtol=1e-4)
        variants = [(ours, nullcontext), (ours, unpacked), (theirs, unpacked)]
        optimizers = [torch.optim.AdamW(network.train().parameters(), lr=0) for network, _ in variants]
        times: list[list[float]] = [[] for _ in variants]
        for _ in range(arguments.repeats + 1):
            for (network, products), optimizer, record in zip(variants, optimizers, times, strict=True):
                start = clock()
                with products():
                    step(network, optimizer, features)
                record.append(clock() - start)
        first, *others = (median(record[1:]) for record in times)  # without the warm-up
        ratios = " | ".join(f"x {other / first:.2f}" for other in others)
        print(f"| {batch} | {1000 * first:.0f} ms | {ratios} |", flush=True)


def published(network: FeatureReconstruction) -> FeatureReconstruction:
    """The same network with PyTorch's modules."""
    other = copy.deepcopy(network)
    for module in list(other.modules()):
        for name, child in module.named_children():
            if isinstance(child, Attention):
                setattr(module, name, PublishedAttention(child))
            elif isinstance(child, nn.Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return other


def step(network: nn.Module, optimizer: torch.optim.Optimizer, features: torch.Tensor) -> None:
    """One step of the training."""
    optimizer.zero_grad()
    F.mse_loss(network(features), features).backward()
    optimizer.step()


if __name__ == "__main__":
    main()
