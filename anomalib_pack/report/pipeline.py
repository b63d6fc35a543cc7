"""The subcommand `anomalib report`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from anomalib.pipelines.components.base import Pipeline, Runner
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console

from anomalib_pack.files import replace_file
from anomalib_pack.report.document import MEGABYTE, make_document
from anomalib_pack.report.pictures import Limits, Pictures, make_pictures
from anomalib_pack.report.runs import read_runs

NAME = "report.html"


class Report(Pipeline):
    """Make one HTML file of test runs: scores, thresholds, metrics, curves and the worst mistakes."""

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Return a parser for the folders of runs, and how large the file may be."""
        if parser is None:
            parser = ArgumentParser(prog="anomalib report")
            parser.add_argument("runs", type=Path, nargs="+", help="Folders of test runs or sweeps.")
            parser.add_argument(
                "--out",
                type=Path | None,
                help=f"The file. By default {NAME} in the folder of the run; of several, in the working directory.",
            )
            parser.add_argument("--thumbnails", type=NonNegativeInt, default=2000, help="Number of pictures at most.")
            parser.add_argument("--thumbnail_height", type=PositiveInt, default=128, help="Height of them in pixels.")
            parser.add_argument(
                "--worst",
                type=NonNegativeInt,
                default=50,
                help="Number of the worst mistakes, whose pictures are four times as high.",
            )
            parser.add_argument(
                "--max_size",
                type=PositiveFloat,
                default=50,
                help="Size of the file in MB, above which the images that matter least have no picture.",
            )
        return parser

    def run(self, args: Namespace | None = None) -> None:
        """Write the report.

        Args:
            args: What :meth:`get_parser` parsed; by default from the command line.

        Raises:
            SystemExit: With status 2 if a folder is no run, or the file cannot be written.
        """
        parser = self.get_parser()
        args = parser.parse_args() if args is None else args
        out = args.out or (args.runs[0] / NAME if len(args.runs) == 1 else Path(NAME))
        limits = Limits(args.thumbnails, args.thumbnail_height, args.worst, round(args.max_size * MEGABYTE))
        try:
            runs = read_runs(args.runs)
            bare = make_document(runs, Pictures(of_images=[[None] * len(run.images) for run in runs]), limits)
            # Each picture has its numbers and commas beside it, and its position in the data.
            pictures = make_pictures(runs, replace(limits, size=limits.size - len(bare.encode())))
            content = make_document(runs, pictures, limits).encode()
            replace_file(out, content)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        images = sum(len(run.images) for run in runs)
        size = f"{len(content) / MEGABYTE:.1f} MB, images: {images}, pictures: {len(pictures.files)}"
        Console().print(f"Report: {out} ({size})", markup=False, soft_wrap=True)

    def _setup_runners(self, args: dict) -> list[Runner]:
        """Return none: nothing runs."""
        del args
        return []
