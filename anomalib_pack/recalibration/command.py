"""The command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from anomalib.models import AnomalibModule

from anomalib_pack.checkpoints import TRAINED_STATE
from anomalib_pack.data.predict import PredictImages
from anomalib_pack.files import replace_tensors
from anomalib_pack.remeasuring import MEASURED_WITH
from anomalib_pack.restoring import model_from_checkpoint, read_checkpoint

from .measuring import Measured, folders, measure, measure_parts
from .report import as_text, column
from .thresholds import Goal, check_post_processor, recalibrate
from .weights import Choice, WeighsScores, check_weights, choose

KINDS = ("Normal", "Anomalous")
DESCRIPTION = (
    "Set the thresholds of a trained model anew from folders of images, without training. The new checkpoint differs "
    "from the old one in thresholds and normalisation alone, and with --weights in the weights of scores."
)


def run(arguments: Sequence[str]) -> int:
    """Recalibrate the checkpoint that is described by the arguments of the command, and print the report.

    Returns:
        Exit status: 0.

    Raises:
        OSError: If a file cannot be read or written; the message names it.
        ValueError: If an argument is impossible, or the checkpoint's model cannot be recalibrated.
    """
    given = _parser().parse_args(arguments)
    goal = Goal(given.false_alarms, given.threshold)
    if given.out.exists():
        msg = f"--out must be a new file, but {given.out} exists."
        raise FileExistsError(msg)
    if given.weights and given.anomalous is None:
        msg = "--weights needs --anomalous: normal images do not tell which scores find anomalies."
        raise ValueError(msg)
    images = folders(given.normal, given.anomalous, given.white_level)
    model = model_from_checkpoint(given.ckpt_path, given.model)
    check_post_processor(model.post_processor)
    if given.weights:
        check_weights(model, *map(len, images))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    measured = _measured(model, images)
    before = column(model.post_processor, *measured)
    weights = _choose_weights(model, images, measured) + "\n\n" if given.weights else ""
    recalibrate(model.post_processor, *measured, goal=goal)
    _write(given.out, given.ckpt_path, model)
    table = as_text(before, column(model.post_processor, *measured), goal, *measured)
    print(f"{weights}{table}\nWritten to {given.out}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m anomalib_pack recalibrate", description=DESCRIPTION)
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="FILE", help="checkpoint of a trained model")
    parser.add_argument(
        "--normal", type=Path, required=True, metavar="DIR", help="folder of normal images, which it was not trained on"
    )
    parser.add_argument("--anomalous", type=Path, metavar="DIR", help="folder of anomalous images")
    parser.add_argument(
        "--false_alarms",
        type=float,
        metavar="SHARE",
        help="share of normal images that is to be anomalous; default: the best F1 score with --anomalous, else 0.01",
    )
    parser.add_argument("--threshold", type=float, metavar="RAW", help="in its place: the raw score itself")
    parser.add_argument("--weights", action="store_true", help="choose the weights of scores too (Unislad)")
    parser.add_argument("--model", metavar="NAME", help="class of the model, for checkpoints that do not say it")
    parser.add_argument("--white_level", type=float, help="what is white in images of more than 8 bits, as in training")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new checkpoint")
    return parser


def _measured(model: AnomalibModule, images: Sequence[PredictImages]) -> list[Measured]:
    return [measure(model, folder, f"{kind} images") for kind, folder in zip(KINDS, images, strict=False)]


def _choose_weights(model: WeighsScores, images: Sequence[PredictImages], measured: list[Measured]) -> str:
    """Give the model better weights, if there are some, and the images the scores by them; a line of the report."""
    names, now = list(model.score_weights), tuple(model.score_weights.values())
    parts = [
        measure_parts(model, folder, f"Scores of {kind.lower()} images", model.scores_to_weigh)
        for kind, folder in zip(KINDS, images, strict=True)
    ]

    def score(weights: Sequence[float], rows: torch.Tensor) -> torch.Tensor:
        return model.weighed(rows.to(model.device), dict(zip(names, weights, strict=True))).cpu()

    choice = choose(score, now, *parts)
    if not choice.pays:
        return f"Weights stay {_listed(names, now)}: {_gain(choice)}"
    model.take_trained_state(model.trained_state | dict(zip(names, choice.weights, strict=True)))
    measured[:] = [
        replace(each, scores=score(choice.weights, rows)) for each, rows in zip(measured, parts, strict=True)
    ]
    return f"Weights {_listed(names, choice.weights)} in place of {_listed(names, now)}: {_gain(choice)}"


def _listed(names: Sequence[str], weights: Sequence[float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True))


def _gain(choice: Choice) -> str:
    return (
        f"image AUROC {choice.before:.3f} so far, {choice.after:.3f} with weights chosen on other images, gain "
        f"{choice.after - choice.before:+.3f}, spread {choice.spread:.3f}."
    )


def _write(out: Path, checkpoint_path: Path, model: AnomalibModule) -> None:
    """Write the checkpoint with the post-processor's buffers, and the weights that were chosen, now or before."""
    checkpoint = read_checkpoint(checkpoint_path)
    buffers = {name: value.cpu() for name, value in model.post_processor.state_dict().items()}
    checkpoint["state_dict"] |= {f"post_processor.{name}": value for name, value in buffers.items()}
    # A trainer restores the states of callbacks after the model's, and the post-processor is one of them.
    callbacks = checkpoint.get("callbacks", {})
    if model.post_processor.state_key in callbacks:
        callbacks[model.post_processor.state_key] = buffers
    weights = getattr(model, "score_weights", {})
    state = getattr(model, "trained_state", {})
    chosen = {name: state[name] for name in weights if name in state}
    if chosen:
        checkpoint[TRAINED_STATE] = checkpoint.get(TRAINED_STATE, {}) | chosen
        checkpoint[MEASURED_WITH] = model.settings
    replace_tensors(out, checkpoint)
