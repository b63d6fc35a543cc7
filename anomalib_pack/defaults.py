"""What the models of the pack choose alike where Anomalib lets a model choose."""

from __future__ import annotations

import inspect
from typing import Any

from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor

from .metrics import GroupEvaluator, default_test_metrics
from .post_processing import RankPreservingPostProcessor


class OneClassDefaults:
    """Mixin for models that learn from normal images; stands before ``AnomalibModule``."""

    def __new__(cls, *_arguments: Any, **keywords: Any) -> OneClassDefaults:
        """Say what stands in the place of an argument that most of Anomalib's models have.

        Raises:
            TypeError: If ``pre_trained`` is given and the model takes ``weights``.
        """
        names = [name for name in inspect.signature(cls).parameters if name in {"weights", "vit_weights"}]
        if "pre_trained" in keywords and names:
            msg = (
                f"{cls.__name__} has no argument pre_trained, but {' and '.join(names)}: 'hub' for trained ones "
                "from timm, the path of a file, or None for random ones."
            )
            raise TypeError(msg)
        return super().__new__(cls)

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
