"""A model as it is measured: fresh, from a checkpoint, or fitted where it has a memory bank."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from anomalib.data import get_datamodule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, get_model
from torch import Size

from anomalib_pack.efficiency.settings import Entry
from anomalib_pack.process import in_own_process


def build(entry: Entry, device: str) -> tuple[AnomalibModule, list[str]]:
    """Build a model that can predict.

    Without a checkpoint, a model whose memory bank is empty is fitted; other models keep the weights that their
    constructor gives them, which cost as much as trained ones.

    Args:
        entry: The model.
        device: Where it is fitted, if it is.

    Returns:
        The model on the CPU, and the names of the buffers that make up its memory bank.
    """
    fresh = _construct(entry)
    if entry.ckpt_path is not None:
        model = _restore(fresh, entry, entry.ckpt_path)
        fresh = type(model)(**model.hparams)  # the entry need not repeat the checkpoint's arguments
    elif any(buffer.numel() == 0 for buffer in fresh.model.buffers()):
        with TemporaryDirectory() as folder:
            # In a process of its own, as fitting takes far more memory than the passes that are measured.
            checkpoint = in_own_process(fit, entry, device, folder)
            model = _restore(fresh, entry, checkpoint)
    else:
        model = fresh
    return model, _bank(fresh, model)


def fit(entry: Entry, device: str, folder: str) -> str:
    """Fit a model on the entry's data.

    Args:
        entry: The model.
        device: `cpu`, `cuda` or `cuda:N`.
        folder: Where everything is written.

    Returns:
        Path of the checkpoint.
    """
    kind, _, index = device.partition(":")
    engine = Engine(
        accelerator="gpu" if kind == "cuda" else "cpu",
        devices=[int(index)] if index else 1,
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
    )
    engine.fit(_construct(entry), datamodule=get_datamodule({"data": entry.data}))
    checkpoint = str(Path(folder) / "fitted.ckpt")
    engine.trainer.save_checkpoint(checkpoint)
    return checkpoint


def _construct(entry: Entry) -> AnomalibModule:
    # Beside the dictionary arguments stay plain; in it they become OmegaConf's, with which no checkpoint can be loaded.
    return _resize(get_model({"class_path": entry.class_path}, **entry.init_args), entry)


def _restore(fresh: AnomalibModule, entry: Entry, checkpoint: str) -> AnomalibModule:
    # The entry's arguments go before those in the checkpoint, e.g. weights that need not be downloaded again.
    model = type(fresh).load_from_checkpoint(checkpoint, map_location="cpu", **entry.init_args)
    return _resize(model, entry)


def _resize(model: AnomalibModule, entry: Entry) -> AnomalibModule:
    if entry.image_size is not None:
        model.pre_processor = model.configure_pre_processor(tuple(entry.image_size))
    return model


def _bank(fresh: AnomalibModule, model: AnomalibModule) -> list[str]:
    """Buffers that fitting has changed in shape: a fresh model does not know how many features it will keep."""
    shapes: dict[str, Size] = {name: buffer.shape for name, buffer in fresh.model.named_buffers()}
    return [name for name, buffer in model.model.named_buffers() if buffer.shape != shapes.get(name)]
