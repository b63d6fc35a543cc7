"""The command."""

from __future__ import annotations

from collections.abc import Sequence

from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser

from anomalib_pack.data.categories import refusal_explained
from anomalib_pack.data.image_files import map_files
from anomalib_pack.data.synthetic_loco import SyntheticLoco
from anomalib_pack.progress import progress_bar

from .defects import defect_errors
from .facts import image_facts, mask_facts
from .findings import Findings, find
from .listing import list_images
from .report import as_text


def run(arguments: Sequence[str]) -> int:
    """Read the data set that is described by the arguments of the command, and print the report.

    Returns:
        Exit status: 1 if the data set has errors.
    """
    parser = ArgumentParser(prog="python -m anomalib_pack check", description="Read a data set once before a training.")
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    text, errors = check(parser.instantiate_classes(parser.parse_args(arguments)).data)
    print(text)
    return int(errors > 0)


def check(datamodule: AnomalibDataModule) -> tuple[str, int]:
    """Report on the data set of a datamodule. Nothing is downloaded; what is rendered is rendered first.

    Returns:
        The report, and how many errors it has.
    """
    datamodule.looks_at_files = False  # what the pack's datamodules would stop at is to be in the report
    try:
        with refusal_explained():
            if isinstance(datamodule, SyntheticLoco):
                datamodule.prepare_data()
            datamodule.setup()
    except (OSError, RuntimeError, ValueError) as error:  # lists are made, and some of what is missing is found
        return as_text([], {}, Findings([str(error)], {})), 1
    images = list_images(datamodule)
    unique = list({image.path: image for image in images}.values())
    mask_paths = list(dict.fromkeys(str(path) for image in unique for path in image.masks))
    with progress_bar(total=len(unique) + len(mask_paths), desc="Reading files", leave=False) as bar:
        facts, masks = {}, {}
        for image, found in zip(unique, map_files(image_facts, unique), strict=True):
            facts[image.path] = found
            bar.update()
        for path, found in zip(mask_paths, map_files(mask_facts, mask_paths), strict=True):
            masks[path] = found
            bar.update()
    findings = find(images, facts, masks, *defect_errors(datamodule))
    return as_text(images, facts, findings), len(findings.errors)
