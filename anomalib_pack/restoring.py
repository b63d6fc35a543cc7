"""A model from a checkpoint file alone: class, arguments, post-processor and tensors."""

from __future__ import annotations

import inspect
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import anomalib.models
import torch
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.utils.serialization import anomalib_safe_globals

from .checkpoints import CLASS_PATH, class_path
from .post_processing import RankPreservingPostProcessor

POST_PROCESSOR = "anomalib_post_processor_config"  # Anomalib's key in a checkpoint


def model_from_checkpoint(path: str | Path, model: str | type[AnomalibModule] | None = None) -> AnomalibModule:
    """Build the model that a checkpoint holds, on the CPU and in eval mode.

    Arguments, pre-processor, post-processor and tensors are the checkpoint's; nothing is downloaded. Checkpoints of the
    pack's models say their class, which is looked up among the models that Anomalib has and those that are plugged into
    it: nothing is imported because a file says so. Evaluator and visualizer are left out.

    Args:
        path: The checkpoint.
        model: Class, or its name as ``--model`` takes it, where the checkpoint does not say it: Anomalib's own models.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or its class or that of its post-processor is unknown; the message names
            the file.
    """
    checkpoint = read_checkpoint(path)
    model_class = model_class_of(checkpoint, path, model)
    arguments = {"evaluator": False, "visualizer": False}
    post_processor = _post_processor(checkpoint)
    if post_processor is not None:
        arguments["post_processor"] = post_processor
    if "pre_trained" in inspect.signature(model_class).parameters:
        arguments["pre_trained"] = False  # the checkpoint's weights take the place of those from the hub
    restored = model_class.load_from_checkpoint(path, map_location="cpu", **arguments)
    if post_processor is None:
        _check_post_processor(restored, checkpoint, path)
    return restored.eval()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint file holds, with its tensors on the CPU, which stay in the file until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of an Anomalib model; the message names it.
    """
    if not Path(path).is_file():
        msg = f"There is no checkpoint {path}."
        raise FileNotFoundError(msg)
    if not is_zipfile(path):
        msg = f"{path} is not a checkpoint, or only a part of one."
        raise ValueError(msg)
    try:
        types = [each for cls in known_models().values() for each in cls.checkpoint_safe_globals()]
        with anomalib_safe_globals(extra=types):  # what models have in a checkpoint beside plain data
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError) as error:
        msg = f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}"
        raise ValueError(msg) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        msg = f"{path} is not a checkpoint of a model: it has no state_dict."
        raise ValueError(msg)
    return checkpoint


def model_class_of(
    checkpoint: dict[str, Any], path: str | Path, model: str | type[AnomalibModule] | None = None
) -> type[AnomalibModule]:
    """Find the class of a checkpoint's model.

    Args:
        checkpoint: What :func:`read_checkpoint` gave.
        path: The file, for messages.
        model: See :func:`model_from_checkpoint`; it must not contradict the checkpoint.

    Raises:
        ValueError: If it is unknown, or another than the checkpoint says.
    """
    known = known_models()
    stored = checkpoint.get(CLASS_PATH)
    found = next((cls for cls in known.values() if class_path(cls) == stored), None)
    if model is None:
        if found is None:
            reason = f"says {stored}, which is not registered with Anomalib" if stored else "does not say its class"
            msg = f"The checkpoint {path} {reason}: name the model, e.g. model='Patchcore' or --model Patchcore."
            raise ValueError(msg)
        return found
    given = _by_name(known, model) if isinstance(model, str) else model
    if stored not in (None, class_path(given)):
        msg = f"The checkpoint {path} is of {stored}, not of {class_path(given)}."
        raise ValueError(msg)
    return given


def known_models() -> dict[str, type[AnomalibModule]]:
    """Anomalib's models and those that are plugged into it, by name."""
    return {name: getattr(anomalib.models, name) for name in anomalib.models.__all__}


def _by_name(known: dict[str, type[AnomalibModule]], name: str) -> type[AnomalibModule]:
    """The class of a name as Anomalib takes it: ``EfficientAd``, ``efficient_ad`` or with its module."""
    spelled = {key.lower(): cls for key, cls in known.items()}
    for key in (name, name.rpartition(".")[-1]):
        if (cls := spelled.get(key.replace("_", "").lower())) is not None:
            return cls
    msg = f"There is no model {name}. Those that Anomalib knows are {', '.join(sorted(known))}."
    raise ValueError(msg)


def _post_processor(checkpoint: dict[str, Any]) -> PostProcessor | None:
    """Post-processor of the class that the checkpoint's settings are of; ``None`` where it is not known."""
    settings = checkpoint.get(POST_PROCESSOR)
    for each in (PostProcessor(), RankPreservingPostProcessor()):
        if settings is not None and settings.keys() == each.checkpoint_config().keys():
            return each
    return None


def _check_post_processor(model: AnomalibModule, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuse settings that are not of the model's own post-processor: its results would not be the checkpoint's."""
    settings = checkpoint.get(POST_PROCESSOR)
    configured = getattr(model.post_processor, "checkpoint_config", dict)()
    if settings is not None and settings.keys() != configured.keys():
        msg = (
            f"The post-processor of the checkpoint {path} is of a class that is not known. Load it by "
            f"{type(model).__name__}.load_from_checkpoint with that post_processor."
        )
        raise ValueError(msg)
