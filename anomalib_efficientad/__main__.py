"""Command that distils a teacher: ``python -m anomalib_efficientad distill --help``."""

from jsonargparse import auto_cli

from .distillation import distill

if __name__ == "__main__":
    auto_cli({"distill": distill}, as_positional=False, prog="python -m anomalib_efficientad")
