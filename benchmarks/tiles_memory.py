"""Peak memory of a forward pass on one large image, whole and in tiles; random weights.

    python benchmarks/tiles_memory.py --size 2048
    python benchmarks/tiles_memory.py --size 2048 --export # that of the ONNX file in ONNX Runtime

The memory is the process's at its highest less what it had with model and image loaded (Linux), each in a process of
its own. Uniad and MiniMaxAd have EfficientNet-Lite0, Ulsad too, with 64 channels.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import anomalib.models
import onnxruntime
import torch
from anomalib.data.utils.tiler import Tiler

from anomalib_pack.efficiency.memory import peak_mib, reset_peak

LITE = {"weights": None}
MODELS = {
    "MiniMaxAd": {"encoder": "timm:tf_efficientnet_lite0", **LITE},
    "Uniad": {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.0", "blocks.1", "blocks.2", "blocks.4"], **LITE},
    "Ulsad": {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"], "feature_dim": 64, **LITE},
}
CPU = torch.device("cpu")


def main() -> None:
    """Print a row for each model, or the figure of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--stride", type=int, default=192)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WHOLE_OR_TILED"))
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(*arguments.one, arguments))
        return
    print(f"| {arguments.size} x {arguments.size} | whole | tiles of {arguments.tile}, stride {arguments.stride} |")
    print("|---|---|---|")
    for name in MODELS:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        runs = [subprocess.run([*command, how], capture_output=True, text=True) for how in ("whole", "tiled")]  # noqa: PLW1510
        print(
            f"| {name} | {' | '.join(run.stdout.strip().split(chr(10))[-1] or 'fails' for run in runs)} |", flush=True
        )


@torch.no_grad()
def measure(name: str, how: str, arguments: argparse.Namespace) -> str:
    """MiB of a forward pass."""
    model = getattr(anomalib.models, name)(**MODELS[name], pre_processor=False).eval()
    if how == "tiled":
        model.model.tiler = Tiler(arguments.tile, arguments.stride)
    image = torch.rand(1, 3, arguments.size, arguments.size)
    with TemporaryDirectory() as folder:
        run = session(model, Path(folder), arguments.size) if arguments.export else model.model
        if not arguments.export:
            run(image[..., :512, :512])  # the first call of a network looks for what can be folded
        reset_peak(CPU)
        before = peak_mib(CPU)
        run(image)
        return f"{peak_mib(CPU) - before:.0f} MiB"


def session(model: torch.nn.Module, folder: Path, size: int) -> torch.nn.Module:
    """The model as an ONNX file."""
    file = onnxruntime.InferenceSession(model.to_onnx(folder, input_size=(size, size)))
    return lambda image: file.run(None, {"input": image.numpy()})


if __name__ == "__main__":
    main()
