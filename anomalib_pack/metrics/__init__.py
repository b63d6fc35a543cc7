"""Evaluation per group of test images."""

from anomalib_pack.metrics.group_evaluator import GroupEvaluator, default_test_metrics

__all__ = ["GroupEvaluator", "default_test_metrics"]
