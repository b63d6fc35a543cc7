"""Registers the classes that distributions declare as entry points with Anomalib, which has no plugins of its own.

An entry point is loaded when all of Anomalib that is being imported is there, and its own module is too: a class
cannot be taken out of a module that has run only half. Which module comes first is up to the user (`import
anomalib_ulsad`, `import anomalib.models`, unpickling a model), so whatever cannot be had yet is tried again as soon as
the module that it waits for is whole.
"""

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

from anomalib_pack._autoload import GROUPS

logger = logging.getLogger(__name__)

# The class in each module of Anomalib from which its plugins derive.
_BASE_CLASSES = {
    "anomalib.data": "AnomalibDataModule",
    "anomalib.models": "AnomalibModule",
    "anomalib.cli.pipelines": "Pipeline",
}


@dataclass
class Plugin:
    """An entry point and what became of it.

    Attributes:
        module_name: Module of Anomalib that the class is registered with.
        loaded: Whether it is registered. It is not yet while Anomalib's module has not been imported.
        error: Why it will not be registered; empty if nothing is wrong.
    """

    entry_point: metadata.EntryPoint
    module_name: str
    distribution: str
    version: str
    loaded: bool = False
    error: str = ""

    def reject(self, error: str) -> None:
        """Note and say, once, why this one is not registered."""
        self.error = " ".join(error.split())  # one line each, as there may be many
        logger.warning(
            "%s %s: the entry point %s = %s in [%s] is not registered: %s",
            self.distribution,
            self.version,
            self.entry_point.name,
            self.entry_point.value,
            self.entry_point.group,
            self.error,
        )


_lock = threading.Lock()  # for the two below; never held while something is imported on behalf of a plugin
_plugins: list[Plugin] | None = None
_waiting: dict[str, list[Callable[[], None]]] = {}


def plugins() -> list[Plugin]:
    """Everything that the installed distributions declare, ordered by distribution."""
    global _plugins  # noqa: PLW0603  # one scan of the environment per process
    with _lock:
        if _plugins is None:
            _plugins = _discover()
            _reject_second_claims(_plugins)
        return _plugins


def register(module_name: str) -> None:
    """Register the plugins of a module of Anomalib that has run, now or when the import it is part of is through.

    Args:
        module_name: One of the modules in `GROUPS`.
    """
    # Loading plugins amid an import of Anomalib would import its parts in an order that it was never tried in.
    running = _outermost_anomalib_import()
    if running is not None:
        _when_whole(running, partial(register, module_name))
        return
    for plugin in plugins():
        if plugin.module_name == module_name and not plugin.error:
            _register(plugin)


def _register(plugin: Plugin) -> None:
    """Register one plugin, or wait for the half imported module that it needs, or warn."""
    try:
        own_module = _half_imported(plugin.entry_point.module)
        if own_module is not None:
            _when_whole(own_module, partial(_register, plugin))
            return
        module = sys.modules[plugin.module_name]
        if not plugin.loaded:  # afterwards the name is in the module because it was put there
            _check_name(plugin, module)
        _add(plugin, plugin.entry_point.load(), module)
        plugin.loaded = True
    except (Exception, SystemExit) as error:
        lacking = _half_imported(_module_at_fault(error))
        if lacking is not None:
            _when_whole(lacking, partial(_register, plugin))
        else:
            plugin.reject(f"{type(error).__name__}: {error}")


def _check_name(plugin: Plugin, module: ModuleType) -> None:
    """Refuse a name before its class exists: Anomalib finds classes by name, and takes the last one of two."""
    name = plugin.entry_point.name
    if module.__name__ == "anomalib.cli.pipelines":
        taken = {*module.PIPELINE_REGISTRY, *_own_subcommands()}
    else:
        taken = vars(module)
        if plugin.entry_point.attr != name:
            msg = f"the class is called {plugin.entry_point.attr}, and Anomalib looks up classes by name"
            raise ValueError(msg)
    same = [other for other in taken if _lookup_key(module.__name__, other) == _lookup_key(module.__name__, name)]
    if same:
        msg = f"{module.__name__} has a {same[0]} of its own"
        raise ValueError(msg)


def _own_subcommands() -> set[str]:
    from anomalib.cli import AnomalibCLI  # noqa: PLC0415  # not imported unless the command line is

    return {"install", *AnomalibCLI.subcommands(), *AnomalibCLI.anomalib_subcommands()}


def _lookup_key(module_name: str, name: str) -> str:
    # `get_model` ignores case, so `PADIM` would take the place of `Padim`; everything else is looked up as written.
    return name.lower() if module_name == "anomalib.models" else name


def _add(plugin: Plugin, cls: type, module: ModuleType) -> None:
    name = plugin.entry_point.name
    base = getattr(module, _BASE_CLASSES[module.__name__])
    if not (isinstance(cls, type) and issubclass(cls, base)):
        msg = f"{plugin.entry_point.value} is not a subclass of {base.__name__}"
        raise TypeError(msg)
    if module.__name__ == "anomalib.cli.pipelines":
        cls.get_parser()  # `anomalib` does this for each of its commands, so it must not fail there
        module.PIPELINE_REGISTRY[name] = cls
        return
    setattr(module, name, cls)
    if name not in module.__all__:
        module.__all__.append(name)
    if module.__name__ == "anomalib.models":
        # The list is a security check: the module that the user installed the entry point for, the one that defines the
        # class, which Anomalib's own configurations name, and nothing around them.
        module.ALLOWED_MODULES.update({plugin.entry_point.module, cls.__module__})


def _discover() -> list[Plugin]:
    found = [
        Plugin(entry_point, module_name, entry_point.dist.name, entry_point.dist.version)
        for module_name, group in GROUPS.items()
        for entry_point in metadata.entry_points(group=group)
    ]
    return sorted(found, key=lambda plugin: plugin.distribution.lower())


def _reject_second_claims(found: list[Plugin]) -> None:
    first: dict[tuple[str, str], Plugin] = {}
    for plugin in found:
        key = (plugin.module_name, _lookup_key(plugin.module_name, plugin.entry_point.name))
        owner = first.setdefault(key, plugin)
        if owner is not plugin:
            plugin.reject(f"the name belongs to {owner.entry_point.value} of {owner.distribution} {owner.version}")


# --- Waiting for half imported modules ---


class _WatchedSpec(ModuleSpec):
    """Says when its module is whole: importlib sets `_initializing` to False then, whether the import went well or not.

    There is no public way to hear of the end of an import that has begun before one starts listening.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec
            _call_waiting(self.name)


def _when_whole(spec: ModuleSpec, callback: Callable[[], None]) -> None:
    with _lock:
        _waiting.setdefault(spec.name, []).append(callback)
    spec.__class__ = _WatchedSpec
    if not spec._initializing:  # it was another thread's import, which ended meanwhile
        _call_waiting(spec.name)


def _call_waiting(name: str) -> None:
    with _lock:
        callbacks = _waiting.pop(name, [])
    for callback in callbacks:
        callback()


def _half_imported(name: str | None) -> ModuleSpec | None:
    """The spec of a module that is being imported, by this thread or another; None if it is whole or not there."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec if getattr(spec, "_initializing", False) else None


def _module_at_fault(error: BaseException) -> str | None:
    """The module that lacked the name that an import failed for."""
    if isinstance(error, ImportError):
        return error.name
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return error.obj.__name__
    return None


def _outermost_anomalib_import() -> ModuleSpec | None:
    """The spec of the module of Anomalib whose import made this thread import all others, if there is one.

    The thread's own frames tell it: what other threads are importing is theirs to wait for.
    """
    outermost = None
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "<module>" and name.split(".")[0] == "anomalib":
            outermost = _half_imported(name) or outermost
        frame = frame.f_back
    return outermost
