"""Parts of UniSLAD: local features, pooling to image vectors, whitening and Mahalanobis distance."""

from .distribution import NominalDistribution
from .local_features import AGGREGATIONS, LocalAggregator, pooled_values
from .pooling import POOLINGS, image_vector, lower_upper_mean, power_mean
from .whitening import Whitening

__all__ = [
    "AGGREGATIONS",
    "POOLINGS",
    "LocalAggregator",
    "NominalDistribution",
    "Whitening",
    "image_vector",
    "lower_upper_mean",
    "pooled_values",
    "power_mean",
]
