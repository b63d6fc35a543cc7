"""What the method package imports, and what imports Anomalib first: a trap if this is the first import."""

from anomalib.models import AnomalibModule  # noqa: F401

SCALE = 2.0
