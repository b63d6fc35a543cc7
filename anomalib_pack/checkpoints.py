"""What a model takes from a checkpoint, what it keeps of its own, and that it says so."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.spec import spec_to_transform, transform_to_spec
from anomalib.utils.path import paths_to_strings
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from .checks import check_input_size
from .region import build_region, check_region, region_of
from .remeasuring import ValidatesForOtherSettings

logger = logging.getLogger(__name__)

PRE_PROCESSOR = "anomalib_pre_processor_config"  # Anomalib's key in a checkpoint
CLASS_PATH = "class_path"  # key in a checkpoint: module and name of the model's class
TRAINED_STATE = "trained_state"  # key in a checkpoint: arguments that are state of the trained model
NO_STATE = {"region": None}  # of a checkpoint that says nothing of it
COMPONENTS = ("pre_processor", "post_processor")  # those with a configuration in a checkpoint
OPTIMIZER = ("lr", "weight_decay")  # for training alone, and its state in a checkpoint holds them
EXECUTION = ("cache", "cache_budget")  # how a training runs, not what it comes to
WEIGHTS = ("weights", "vit_weights", "teacher_weights")  # a checkpoint carries what was loaded from there


class FollowsCheckpoint:
    """Mixin for models that a checkpoint is loaded into; stands before ``AnomalibModule``.

    The pre-processor is state of the trained model: the checkpoint's is taken, and the datamodule resizes to its size.
    So are, as Anomalib has it, the switches of the post-processor, and the arguments in :attr:`trained_state`.
    Of all other arguments those of the constructor stay, and a warning names each that changes results.

    A checkpoint says the class of its model, see :mod:`anomalib_pack.restoring`.
    """

    without_effect: tuple[str, ...] = ()  # arguments that change nothing in the results of a trained model
    _differing: tuple[str, ...] = ()  # arguments that the checkpoint had other values of, with both

    def setup(self, stage: str) -> None:
        """Check the size of the images, and that the region lies in them as it was drawn.

        Raises:
            ValueError: If the pre-processor resizes them to a size that the network cannot take, or the region lies
                elsewhere.
        """
        super().setup(stage)
        # Outside training a checkpoint may come next, with other tiles and another size.
        if stage == "fit" or getattr(self.model, "tiler", None) is None:
            check_input_size(self)
        check_region(self)

    @property
    def trained_state(self) -> dict[str, Any]:
        """Arguments that are state of the trained model, plain data by name: a checkpoint's win over the constructor's.

        A mixin that has some adds them to those of ``super()``, and takes them in :meth:`take_trained_state`.
        """
        return {"region": region_of(self).given}

    def take_trained_state(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's :attr:`trained_state`, before its tensors are loaded."""
        if "region" in state and state["region"] != region_of(self).given:
            self.model.region = build_region(state["region"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save class, state and components, and nothing, not `None`, of a transform that Anomalib cannot store."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CLASS_PATH] = class_path(type(self))
        checkpoint[TRAINED_STATE] = self.trained_state
        stored = checkpoint.get(PRE_PROCESSOR)
        if stored == {"transform": None} and getattr(self.pre_processor, "transform", None) is not None:
            del checkpoint[PRE_PROCESSOR]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's pre-processor, in the datamodule too, and say what differs from the constructor's."""
        trainer = self._trainer  # None in load_from_checkpoint, whose arguments differ on purpose
        before = {name: getattr(self, name) for name in COMPONENTS}
        given = {name: _described(component) for name, component in before.items()}
        if self.pre_processor is None and PRE_PROCESSOR in checkpoint:
            self.pre_processor = PreProcessor()
        super().on_load_checkpoint(checkpoint)
        self._say_what_the_components_are(checkpoint, given)
        self._take_trained_state(NO_STATE | checkpoint.get(TRAINED_STATE, {}))
        differing = self._differing_arguments(checkpoint)
        self._differing = tuple(differing.values())
        if trainer is None:
            return
        for name, component in before.items():
            _replace_callback(trainer, component, getattr(self, name))
        if isinstance(trainer.datamodule, AnomalibDataModule):
            trainer.datamodule.setup(trainer.state.fn)  # it is set up, this only gives it the pre-processor's resize
        check_region(self)
        self._warn_of_other_arguments(differing)

    def _take_trained_state(self, state: dict[str, Any]) -> None:
        """Take arguments that are state, and say in one line which of the constructor's they replace."""
        before = {name: self.trained_state.get(name, self.hparams.get(name)) for name in state}
        others = [
            f"{name}={_brief(value)} instead of {_brief(before[name])}"
            for name, value in state.items()
            if _plain(value) != _plain(before[name])
        ]
        self.take_trained_state(state)
        if others:
            _warn(self._trainer, f"The checkpoint's values are used, not the constructor's: {'; '.join(others)}.")

    def _say_what_the_components_are(self, checkpoint: dict[str, Any], given: dict[str, str]) -> None:
        taken = {name: _described(getattr(self, name)) for name in COMPONENTS}
        used_in_training = checkpoint.get("anomalib_components_enabled", {}).get("pre_processor", False)
        if used_in_training and PRE_PROCESSOR not in checkpoint:
            _warn(
                self._trainer,
                "The checkpoint does not hold the transform of its pre-processor, which Anomalib cannot store: taking "
                f"the constructor's, {taken['pre_processor']}.",
            )
        for name, configure in zip(
            COMPONENTS, (self.configure_pre_processor, self.configure_post_processor), strict=True
        ):
            is_default = given[name] == _described(configure())  # then load_from_checkpoint was given none
            if taken[name] != given[name] and not (self._trainer is None and is_default):
                _warn(
                    self._trainer,
                    f"The {name} is the checkpoint's, {taken[name]}, instead of the constructor's, {given[name]}.",
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Load the tensors.

        Raises:
            RuntimeError: If they are of another network; the message names the arguments that differ.
        """
        try:
            return super().load_state_dict(state_dict, *arguments, **keywords)
        except RuntimeError as error:
            if not self._differing:
                raise
            msg = f"The checkpoint does not fit the arguments of {self.name}: {'; '.join(self._differing)}. {error}"
            raise RuntimeError(msg) from error

    def _differing_arguments(self, checkpoint: dict[str, Any]) -> dict[str, str]:
        theirs = checkpoint.get("hyper_parameters", {})
        ours = {name: self.hparams[name] for name in inspect.signature(type(self)).parameters if name in self.hparams}
        return {
            name: f"{name}={theirs[name]!r} in the checkpoint, {value!r} here"
            for name, value in ours.items()
            if name in theirs
            and name not in (*WEIGHTS, *EXECUTION, *checkpoint.get(TRAINED_STATE, {}))
            and _plain(theirs[name]) != _plain(value)
        }

    def _warn_of_other_arguments(self, differing: dict[str, str]) -> None:
        trainer = self.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            ignored = [differing[name] for name in OPTIMIZER if name in differing]
            differing = {name: text for name, text in differing.items() if name not in OPTIMIZER}
            if ignored:
                _warn(trainer, f"The checkpoint's optimizer goes on with its own values: {'; '.join(ignored)}.")
        else:
            silent = {*self.without_effect, *OPTIMIZER}
            if isinstance(self, ValidatesForOtherSettings):
                silent |= self.settings.keys()  # it says so itself, and measures anew
            differing = {name: text for name, text in differing.items() if name not in silent}
        if differing:
            _warn(
                trainer,
                f"Arguments differ from those that the checkpoint was trained with: {'; '.join(differing.values())}. "
                "Those given here are used, so results differ, and quantiles, normalisation and thresholds are not "
                "theirs before the next validation. Repeat the checkpoint's values if that is not meant.",
            )


def class_path(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _described(component: nn.Module | None) -> str:
    """What results depend on in a component, the same before and after a checkpoint."""
    if component is None:
        return "none"
    if not isinstance(component, PreProcessor):
        return str(component.checkpoint_config() if hasattr(component, "checkpoint_config") else type(component))
    try:
        return str(spec_to_transform(transform_to_spec(component.transform)))
    except ValueError:  # not a transform that Anomalib stores
        return str(component.transform)


def _plain(value: Any) -> Any:
    """A value without the differences that a configuration file makes."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return paths_to_strings(value)


def _brief(value: Any) -> str:
    """A value for a message: a polygon or mask is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _replace_callback(trainer: Trainer, old: nn.Module | None, new: nn.Module | None) -> None:
    """Let the trainer call a component that took the place of another, which it holds since the run began."""
    if old is new:
        return
    if old in trainer.callbacks:
        trainer.callbacks.remove(old)
    if new is not None:
        trainer.callbacks.insert(0, new)  # a pre-processor comes before what reads images


def _warn(trainer: Trainer | None, message: str) -> None:
    """Log a warning: the command does not show what is below."""
    if trainer is None or trainer.is_global_zero:
        logger.warning(message)
