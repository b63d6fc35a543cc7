"""The tiny model as one of the pack's, with branches, and a state as after a validation."""

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from tiny_model import TinyModel, TinyNet

from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.defaults import OneClassDefaults


class BranchNet(TinyNet):
    """The tiny network, whose map is the mean of two."""

    def check_image_size(self, size: Sequence[int]) -> None:
        """Any will do."""

    def with_branch_scores(self, images: torch.Tensor) -> tuple[InferenceBatch, dict[str, torch.Tensor]]:
        result = self(images)
        halves = {"structural": result.anomaly_map[:, :, :16], "logical": result.anomaly_map[:, :, 16:]}
        return result, {name: half.amax(dim=(1, 2, 3)) for name, half in halves.items()}


class PackModel(FollowsCheckpoint, OneClassDefaults, TinyModel):
    """As a validation leaves it: thresholds and ranges of scores are there."""

    explanation_classes = ("logical", "structural")

    def __init__(self, pre_processor=True, post_processor=True, evaluator=False, visualizer=False):
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        torch.manual_seed(0)
        self.model = BranchNet()
        set_statistics(self.post_processor)


def set_statistics(post_processor) -> None:
    """Thresholds and ranges as of the tiny model's scores."""
    values = {"_image_threshold": 50, "_pixel_threshold": 35, "image_min": 20, "image_max": 60}
    for name, value in (values | {"pixel_min": 20, "pixel_max": 60}).items():
        getattr(post_processor, name).fill_(value)
