"""Models, data and trainer arguments out of a configuration, read by jsonargparse as `anomalib train` does.

So names and types are known to fit before anything is built, and arguments may be objects with a class_path themselves,
e.g. an evaluator.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from functools import cache
from importlib import import_module
from typing import Any

import anomalib.data
import anomalib.models
from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning import Trainer

from anomalib_pack.checks import check_keys

# Bare names are looked up where `get_model` and `get_datamodule` do it.
_BASES = {"model": (anomalib.models, AnomalibModule), "data": (anomalib.data, AnomalibDataModule)}
_KEY = "init_args"  # of the arguments in the parser
_OURS = ("accelerator", "devices", "default_root_dir")  # the runner's and the job's own choice


def check_component(section: str, given: dict[str, Any], where: str) -> None:
    """Check that a class exists and takes the arguments, without building it.

    Args:
        section: ``"model"`` or ``"data"``.
        given: With `class_path` and perhaps `init_args`.
        where: What it is called in an error.

    Raises:
        ValueError: If not. The message says what is allowed.
    """
    cls = find_class(section, given["class_path"], where)
    _parse(cls, given.get("init_args", {}), f"{where}.init_args")


def build_component(section: str, given: dict[str, Any]) -> Any:
    """Build a model or a datamodule from a configuration that :func:`check_component` has passed."""
    cls = find_class(section, given["class_path"], section)
    return cls(**_built(cls, given.get("init_args", {}), section))


def check_trainer(given: dict[str, Any], where: str) -> None:
    """Check arguments of Lightning's ``Trainer``.

    Raises:
        ValueError: If one is unknown, has a wrong type, or is not the user's choice.
    """
    _parse(Trainer, given, where, reserved=_OURS)


def build_trainer_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the ``Trainer``, the given ones alone; callbacks and the like are built."""
    return _built(Trainer, given, "trainer")


def find_class(section: str, class_path: str, where: str) -> type:
    """Return the class that a dotted path, or a bare name among those of Anomalib and its plugins, stands for.

    Raises:
        ValueError: If there is none, or it is no model or datamodule.
    """
    namespace, base = _BASES[section]
    module_name, _, name = str(class_path).rpartition(".")
    try:
        found = getattr(import_module(module_name) if module_name else namespace, name, None)
    except ImportError as error:
        msg = f"{where}.class_path {class_path!r} cannot be imported: {error}."
        raise ValueError(msg) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        names = [each for each in dir(namespace) if _is_component(getattr(namespace, each), base)]
        msg = (
            f"{where}.class_path must be a dotted path of a subclass of {base.__name__} or one of {', '.join(names)}; "
            f"got {class_path!r}."
        )
        raise ValueError(msg)  # noqa: TRY004  # of a configuration, not of a call
    return found


def without_defaults(section: str, given: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the arguments that are the defaults of its class."""
    defaults = _defaults(find_class(section, given["class_path"], section))
    kept = {
        name: value
        for name, value in given.get("init_args", {}).items()
        if name not in defaults or defaults[name] != value
    }
    return {"class_path": given["class_path"], "init_args": kept}


@cache
def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {
        each.name: list(each.default) if isinstance(each.default, tuple) else each.default
        for each in parameters
        if each.default is not each.empty
    }


def _is_component(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _built(cls: type, given: dict[str, Any], where: str) -> dict[str, Any]:
    """The given arguments, with the objects among them built."""
    parser, parsed = _parse(cls, given, where)
    arguments = parser.instantiate_classes(parsed)[_KEY]
    return {name: arguments[name] for name in given}


def _parse(
    cls: type, given: dict[str, Any], where: str, reserved: tuple[str, ...] = ()
) -> tuple[ArgumentParser, Namespace]:
    parameters = inspect.signature(cls).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):  # jsonargparse knows where they go
        check_keys(given, [parameter.name for parameter in parameters if parameter.name not in reserved], where)
    parser = ArgumentParser(exit_on_error=False)
    # The class itself is not the parser's to build, as it would hide the errors of the constructor in one of its own.
    parser.add_class_arguments(cls, _KEY, instantiate=False, fail_untyped=False)
    try:
        return parser, parser.parse_object({_KEY: deepcopy(given)})  # which is changed where it is nested
    except ArgumentError as error:
        msg = f"{where}: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
