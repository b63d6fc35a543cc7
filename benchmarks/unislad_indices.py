"""What approximate searches cost in accuracy: a trained Unislad, validated and tested with each index in turn.

    python benchmarks/unislad_indices.py path/to/model.ckpt MVTecAD magnetic_tile --root path/to/mvtec_ad
    python benchmarks/unislad_indices.py path/to/model.ckpt SyntheticLoco tray

The checkpoint is one that compare_patchcore.py has left in its results, or any other of a model with memory banks.
"""

import argparse
from pathlib import Path

from compare_patchcore import engine_for, load_data, parts_of, report

from anomalib_pack.neighbors import INDICES
from anomalib_unislad import Unislad


def main() -> None:
    """Print each index's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", help="name of a datamodule, e.g. SyntheticLoco or MVTecAD")
    parser.add_argument("category")
    parser.add_argument("--root", help="folder of the data set, by default the datamodule's own")
    parser.add_argument("--indices", nargs="+", default=["flat", "pq"], choices=INDICES)
    parser.add_argument("--results", type=Path, default=Path("results/unislad_indices"))
    arguments = parser.parse_args()

    datamodule = load_data(arguments.dataset, arguments.category, arguments.root)
    for index in arguments.indices:
        others = {"index": index, **parts_of(arguments)}
        model = Unislad.load_from_checkpoint(arguments.checkpoint, weights_only=True, **others)
        engine = engine_for(arguments)
        engine.validate(model, datamodule=datamodule, verbose=False)
        bank = model.model.local_bank.neighbors
        metrics = engine.test(model, datamodule=datamodule, verbose=False)[0]
        report(f"{index} ({bank.kind}), {' x '.join(map(str, bank.bank.shape))}", metrics)


if __name__ == "__main__":
    main()
