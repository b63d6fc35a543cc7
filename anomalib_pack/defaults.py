"""What the models of the pack choose alike where Anomalib lets a model choose."""

from __future__ import annotations

from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor

from .metrics import GroupEvaluator, default_test_metrics
from .post_processing import RankPreservingPostProcessor


class OneClassDefaults:
    """Mixin for models that learn from normal images; stands before ``AnomalibModule``."""

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS

    def configure_post_processor(self) -> PostProcessor:
        """Normalise scores without changing their ranking; threshold from normal images alone where need be."""
        return RankPreservingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The pack's metrics, overall and for each category or anomaly group."""
        return GroupEvaluator(test_metrics=default_test_metrics())
