"""What is wrong with a data set, or may be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from anomalib_pack.data.image_files import left_out
from anomalib_pack.data.masks import MAX_VALUES, empty_message, size_message

from .facts import Facts
from .listing import Listed


@dataclass(frozen=True)
class Findings:
    """Messages: an error spoils a training or its results, a warning may.

    An error names its file. Warnings of one kind are kept together, with the files that they are about.
    """

    errors: list[str]
    warnings: dict[str, list[str]]


def find(
    images: Sequence[Listed],
    facts: Mapping[str, Facts],
    masks: Mapping[str, Facts],
    wrong_defects: Sequence[str] = (),
    missing_for_defects: Sequence[str] = (),
) -> Findings:
    """Look for what is wrong.

    Args:
        images: What the datamodule lists.
        facts: Facts of each image.
        masks: Facts of each mask.
        wrong_defects: What is wrong with defects, some of which is found here too.
        missing_for_defects: What is missing to tell defects apart.
    """
    errors = [found.error for found in [*facts.values(), *masks.values()] if found.error]
    errors += [message for image in _unique(images) for message in _mask_errors(image, facts, masks)]
    leaks, copies = _copies(images, facts)
    warnings = {
        "images of one colour everywhere": [path for path, found in facts.items() if found.is_constant],
        "images of more than 8 bits, which Anomalib's inferencers and pictures clip": _deep(images, facts),
        f"masks with more than {MAX_VALUES} different values": _noisy(images, masks),
        "images of a kind that is not read, left out": [str(path) for path in _left_out(images)],
        "equal files": copies,
        "not all there": [*_one_sided(images), *missing_for_defects],
    }
    return Findings(
        list(dict.fromkeys([*errors, *wrong_defects, *leaks])),
        {kind: found for kind, found in warnings.items() if found},
    )


def _unique(images: Iterable[Listed]) -> list[Listed]:
    """Each file once; a validation set can be the test set."""
    return list({image.path: image for image in images}.values())


def _mask_errors(image: Listed, facts: Mapping[str, Facts], masks: Mapping[str, Facts]) -> Iterator[str]:
    if image.lacks_mask:
        yield f"The anomalous image {image.path} has no mask, but others have."
    known = {str(path): masks[str(path)] for path in image.masks if masks[str(path)].header}
    if facts[image.path].header:
        size = facts[image.path].header.size
        messages = [size_message(path, found.header.size, image.path, size) for path, found in known.items()]
        yield from filter(None, messages)
    if known and len(known) == len(image.masks) and all(found.is_empty for found in known.values()):
        yield empty_message(list(known), image.path)


def _copies(images: Sequence[Listed], facts: Mapping[str, Facts]) -> tuple[list[str], list[str]]:
    """Images that are byte-equal: errors if one is for training and the other for the test, else what is equal."""
    places = defaultdict(list)
    for image in images:
        if facts[image.path].digest:
            places[facts[image.path].digest].append(image)
    leaks, copies = [], []
    for equal in places.values():
        first, *others = _unique(equal)
        splits = {image.path: image.split for image in equal}
        train = next((path for path, split in splits.items() if split == "train"), None)
        leaked = [path for path, split in splits.items() if train and split == "test"]
        leaks += [f"The test image {path} is the training image {train}. Remove one of them." for path in leaked]
        copies += [f"{image.path} = {first.path}" for image in others if image.path not in leaked]
    return leaks, copies


def _deep(images: Sequence[Listed], facts: Mapping[str, Facts]) -> list[str]:
    return [
        image.path
        for image in _unique(images)
        if facts[image.path].header
        and facts[image.path].header.bits > 8
        and (facts[image.path].header.clipped or image.white_level)
    ]


def _noisy(images: Sequence[Listed], masks: Mapping[str, Facts]) -> list[str]:
    return [
        str(path)
        for image in _unique(images)
        if not image.has_kinds
        for path in image.masks
        if masks[str(path)].values > MAX_VALUES
    ]


def _left_out(images: Sequence[Listed]) -> list:
    return left_out([image.path for image in images], [path for image in images for path in image.masks])


def _one_sided(images: Sequence[Listed]) -> Iterator[str]:
    """Categories whose test set has no normal images or no anomalous ones, for which no ranking can be measured."""
    kinds = defaultdict(set)
    for image in images:
        if image.split == "test":
            kinds[image.category].add(image.anomalous)
    for category in dict.fromkeys(image.category for image in images):
        for anomalous, name in ((False, "normal"), (True, "anomalous")):
            if anomalous not in kinds[category]:
                yield f"{category} has no {name} test images"
