"""Time of matrix products in float32 on a CPU: PyTorch's (MKL), and oneDNN's from a packed weight, interleaved.

    python benchmarks/matrix_products.py

In eval mode the networks of this pack take oneDNN's (`anomalib_pack.packing`). The sizes are those of a linear layer of
Uniad's, of one of MiniMaxAd's at stride 8 and of a ViT-B, and of one image of Unislad against a memory bank. The times
are medians; compare them by their ratios only, which differ with the processor's maker.
"""

import argparse
import platform
import time
from statistics import median

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.packing import linear, pack_matrix, packs

SIZES = {
    "Uniad": (196, 256, 1024),
    "MiniMaxAd": (1024, 128, 512),
    "ViT-B": (257, 768, 3072),
    "bank": (3136, 1024, 5488),
}


@torch.no_grad()
def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, PyTorch {torch.__version__}\n")
    print("| product | rows x inner x columns | MKL | packed, oneDNN | faster | difference |\n|" + 6 * "---|")
    for name, (rows, inner, columns) in SIZES.items():
        torch.manual_seed(0)
        inputs, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(columns)
        if not packs(weight):
            parser.error("PyTorch has no oneDNN for this processor.")
        packed = pack_matrix(weight, rows)
        times: list[list[float]] = [[], []]
        for _ in range(arguments.repeats + 1):
            for record, kind in zip(times, (weight, packed), strict=True):
                start = time.perf_counter()
                linear(inputs, kind, bias)
                record.append(time.perf_counter() - start)
        mkl, onednn = (median(record[1:]) for record in times)  # without the warm-up
        expected = F.linear(inputs, weight, bias)
        difference = float((linear(inputs, packed, bias) - expected).abs().max() / expected.abs().max())
        size = f"{rows} x {inner} x {columns}"
        print(f"| {name} | {size} | {1000 * mkl:.2f} ms | {1000 * onednn:.2f} ms | x {mkl / onednn:.2f} | ", end="")
        print(f"{difference:.0e} |")


if __name__ == "__main__":
    main()
