"""EfficientAD with teachers of one's own: distillation, and Anomalib's detector without downloads (WACV 2024)."""

from .lightning_model import DistilledEfficientAd

__all__ = ["DistilledEfficientAd"]
