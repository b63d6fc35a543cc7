"""Notices when Anomalib is imported, and only then brings in the plugins.

The line in `anomalib_pack.pth` runs this in every Python process of the environment. So it imports `sys` alone, and
all that costs time is in `plugins.py`, which a process without Anomalib never imports.
"""

import sys

# What `types` and `importlib.machinery` offer under these names; importing them would cost start-up time.
ModuleType = type(sys)
ModuleSpec = type(sys.__spec__)

# Anomalib's modules that take plugins, and the entry-point group of each.
GROUPS = {
    "anomalib.data": "anomalib.data",
    "anomalib.models": "anomalib.models",
    "anomalib.cli.pipelines": "anomalib.pipelines",
}


class PluginFinder:
    """Finds the modules in `GROUPS` as the other finders do, and has the plugins registered once they ran."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module of Anomalib that takes plugins; every other name is left to the other finders."""
        if fullname not in GROUPS:
            return None
        for finder in sys.meta_path:
            if not isinstance(finder, PluginFinder) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                    return spec
        return None


class _RegisteringLoader:
    """Stands in for a module's loader until the module runs."""

    def __init__(self, loader: object) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        # The module gets its own loader back before it runs: resources, source and pickling work as without plugins.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module.__name__)


def install() -> None:
    """Register the plugins with what is imported of Anomalib, and with the rest as soon as it is."""
    if not any(isinstance(finder, PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PluginFinder())
    for name in GROUPS:
        if name in sys.modules:
            _register(name)


def _register(module_name: str) -> None:
    try:
        from anomalib_pack import plugins  # noqa: PLC0415  # only processes that use Anomalib pay for it

        plugins.register(module_name)
    except Exception:  # whatever happens to this package, e.g. it was just uninstalled: Anomalib must import
        import logging  # noqa: PLC0415

        logging.getLogger(__name__).warning("The plugins of %s could not be registered.", module_name, exc_info=True)
