"""`python -m anomalib_pack`: what is plugged into Anomalib, and the versions of what it runs on; and commands."""

import argparse
import importlib
import json
import sys
from importlib import metadata

from anomalib_pack._autoload import GROUPS
from anomalib_pack.plugins import Plugin, plugins
from anomalib_pack.tables import aligned

# Commands, with the module whose `run` takes the arguments, prints, and returns the exit status; and what they do.
COMMANDS = {
    "check": ("anomalib_pack.data_check.command", "read a data set once before a training"),
    "evaluate": ("anomalib_pack.evaluation.command", "compute metrics of anomaly maps in files"),
    "recalibrate": ("anomalib_pack.recalibration.command", "set the thresholds of a trained model anew"),
}


def main() -> int:
    """Run a command, or print the table of plugins and the versions.

    Returns:
        Exit status: 1 if Anomalib or a plugin could not be loaded or what a command works on has an error, else 0.
    """
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return _run(*sys.argv[1:])
    given = _parser().parse_args()
    errors = [error for error in map(_import_error, GROUPS) if error]  # importing Anomalib's modules loads the plugins
    found = plugins()
    report = {"plugins": [_row(plugin) for plugin in found], "errors": errors, "versions": _versions()}
    print(json.dumps(report, indent=2) if given.json else _as_text(report))
    return int(bool(errors) or not all(plugin.loaded for plugin in found))


def _run(command: str, *arguments: str) -> int:
    module = importlib.import_module(COMMANDS[command][0])  # not before: the table works without Anomalib
    try:
        return module.run(arguments)
    except (OSError, RuntimeError, ValueError) as error:  # of arguments and files; the message names them
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_pack",
        description="Without a command: list what is plugged into Anomalib, and the versions of what it runs on.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", help="COMMAND --help says more")
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    return parser


def _import_error(module_name: str) -> str:
    """Why a module of Anomalib cannot be imported; empty if it can."""
    try:
        importlib.import_module(module_name)
    except Exception as error:
        return f"{module_name}: {type(error).__name__}: {error}"
    return ""


def _row(plugin: Plugin) -> dict[str, str]:
    return {
        "name": plugin.entry_point.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "group": plugin.entry_point.group,
        "status": "loaded" if plugin.loaded else plugin.error or "not loaded",
    }


def _versions() -> dict[str, str]:
    versions = {name: _version(name) for name in ("anomalib", "torch", "lightning", "timm")}
    return {**versions, "faiss": _faiss(), "CUDA": _cuda()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _faiss() -> str:
    """FAISS is asked itself: its distribution is called faiss-cpu, faiss-gpu or faiss-gpu-cu12."""
    try:
        import faiss  # noqa: PLC0415
    except Exception as error:
        return f"cannot be used: {error}"
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    return f"{faiss.__version__}, GPUs: {gpus}"


def _cuda() -> str:
    try:
        import torch  # noqa: PLC0415
    except Exception as error:
        return f"cannot be used: {error}"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no GPU"
    return f"{torch.version.cuda}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _as_text(report: dict) -> str:
    header = ("name", "distribution", "version", "group", "status")
    rows = [header, *([row[key] for key in header] for row in report["plugins"])]
    versions = [f"{name}: {version}" for name, version in report["versions"].items()]
    return "\n".join([*aligned(rows), "", *report["errors"], *versions])


if __name__ == "__main__":
    sys.exit(main())
