"""The page: template, style and script, and the data in it.

Nothing that comes from files becomes markup: the template escapes it, the script sets it as text, and the data lie in a
block that no name can close. A policy in the page forbids all network, and any script or style but these two.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from importlib import metadata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anomalib_pack.report.pictures import Limits, Pictures
from anomalib_pack.report.runs import Run
from anomalib_pack.report.tables import metric_table

MEGABYTE = 10**6
NAMED = 3  # runs in the title; with more of them the page begins with the metrics
SCRIPT = ("theme", "helpers", "run", "state", "histogram", "panel", "curves", "gallery", "viewer", "start")


def make_document(runs: Sequence[Run], pictures: Pictures, limits: Limits) -> str:
    """Make the page."""
    page = Environment(
        loader=PackageLoader("anomalib_pack.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _text(page, "report.css"), _script(page)
    metrics, blocks = metric_table(runs)
    return page.get_template("report.html").render(
        policy=_policy(style, script),
        style=style,
        script=script,
        title=_title(runs),
        runs=runs,
        many=len(runs) > NAMED,
        images=sum(len(run.images) for run in runs),
        created=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=metadata.version("anomalib-pack"),
        metrics=metrics,
        blocks=blocks,
        pictures=pictures,
        limits=limits,
        data=as_block([_content(run, of_run) for run, of_run in zip(runs, pictures.of_images, strict=True)]),
        picture_data=as_block(pictures.files),
    )


def _script(page: Environment) -> str:
    """All files of the script, in a function, so that their names are nobody else's."""
    parts = [_text(page, f"script/{name}.js") for name in SCRIPT]
    return "\n".join(['"use strict";', "(() => {", *parts, "})();"])


def _text(page: Environment, name: str) -> str:
    """A file with the ends of lines that browsers compute its hash of."""
    return "\n".join(page.loader.get_source(page, name)[0].splitlines())


def _title(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs) if len(runs) <= NAMED else f"{len(runs)} runs"


def as_block(content: Any) -> str:
    r"""JSON that can stand in a script element: without ``<``, nothing in it ends the element or begins a comment.

    Example:
        >>> as_block({"name": "</script>"})
        '{"name":"\\u003c/script>"}'
    """
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _policy(style: str, script: str) -> str:
    """Content Security Policy: pictures from the page itself, its own style and script, and nothing else."""
    hashes = [b64encode(sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _content(run: Run, pictures: Sequence[int | None]) -> dict[str, Any]:
    """A run as the script takes it: a list for each property of the images."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "rawThreshold": run.raw_threshold,
        "threshold": run.threshold,
        "checkpoint": run.checkpoint and str(run.checkpoint),
        "path": [image.path for image in run.images],
        "category": [image.category for image in run.images],
        "group": [image.group for image in run.images],
        "label": [image.label for image in run.images],
        "predicted": [image.predicted for image in run.images],
        "raw": [image.raw_score for image in run.images],
        "score": [image.score for image in run.images],
        "explanation": [image.explanation for image in run.images],
        "drawn": [image.picture and str(image.picture) for image in run.images],
        "picture": list(pictures),
    }
