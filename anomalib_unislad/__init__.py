"""UniSLAD: training-free detection of logical and structural anomalies with memory banks and distributions."""

from .lightning_model import Unislad

__all__ = ["Unislad"]
