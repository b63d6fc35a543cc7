"""What recalibration is tried on."""

from pathlib import Path
from typing import NamedTuple

from anomalib.post_processing import PostProcessor

from anomalib_pack.post_processing import RankPreservingPostProcessor

POST_PROCESSORS = {
    "stock": PostProcessor,
    "stock, sensitive": lambda: PostProcessor(image_sensitivity=0.7, pixel_sensitivity=0.4),
    "ours": RankPreservingPostProcessor,
    "ours, sensitive": lambda: RankPreservingPostProcessor(image_sensitivity=0.7, pixel_sensitivity=0.4),
}


class Folders(NamedTuple):
    """Folders of images."""

    validation: Path  # 5 normal ones, which the thresholds of the trainings are from
    normal: Path  # 17, two of them in a folder below
    anomalous: Path  # 8
