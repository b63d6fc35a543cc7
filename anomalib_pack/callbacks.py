"""Callbacks for any Anomalib model."""

from contextlib import suppress
from pathlib import Path

from anomalib.utils.path import create_versioned_dir
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback, seed_everything

from anomalib_pack.evaluation.write_maps import WriteMaps
from anomalib_pack.records.write_records import WriteRecords

__all__ = ["SeedEverything", "WriteMaps", "WriteRecords"]


class SeedEverything(Callback):
    """Makes runs repeatable, from Python and in configurations of the ``anomalib`` command.

    The command declares ``--seed_everything`` but never uses it. It does build the callbacks of the trainer before
    the model, so that seeding in this constructor covers the initial weights. Seeding again when training starts
    makes the rest of the run independent of how many random numbers the construction drew. From Python, build it
    before the model.

    Args:
        seed: Seed of Python, NumPy, PyTorch and the workers of data loaders, in [0, 2^32 - 1].

    Raises:
        ValueError: If the seed is out of range.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Stfpm
        >>> seeding = SeedEverything(42)
        >>> engine, model = Engine(callbacks=[seeding]), Stfpm()  # doctest: +SKIP
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**32:
            msg = f"seed must be in [0, {2**32 - 1}], got {seed}."
            raise ValueError(msg)
        self.seed = seed
        seed_everything(seed, workers=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the order of the data and whatever else the training draws."""
        del trainer, pl_module
        seed_everything(self.seed, workers=True)


class OneFolder(Callback):
    """Keeps the results of a run in one folder, to which ``latest`` leads. All models of the pack have this callback.

    - Where a test or prediction comes before any training, Anomalib makes a folder of ``latest``, in whose place the
      next training cannot put its link. As after a training, the results are in ``v0`` here.
    - Of several processes Anomalib gives each a folder of its own, and ``latest`` leads to that of whoever came last.
      Here all have the first one's, and the others' are removed.
    """

    def setup(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Make folder and link where there is nothing, or share them."""
        folder = Path(trainer.default_root_dir)
        if stage in {"test", "predict"} and folder.name == "latest" and trainer.is_global_zero and not folder.exists():
            create_versioned_dir(folder.parent)
        elif stage == "fit" and trainer.world_size > 1:
            self._share(trainer, folder)

    @staticmethod
    def _share(trainer: Trainer, own: Path) -> None:
        shared = trainer.strategy.broadcast(own)
        if own != shared:
            trainer._default_root_dir = str(shared)  # the property cannot be set
            with suppress(OSError):  # somebody has put something there
                own.rmdir()
        trainer.strategy.barrier("results")
        latest = shared.with_name("latest")
        if trainer.is_global_zero and latest.is_symlink():
            latest.unlink()
            latest.symlink_to(shared, target_is_directory=True)
