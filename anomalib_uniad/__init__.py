"""UniAD: many classes with one model, by feature reconstruction with a transformer (You et al., NeurIPS 2022)."""

from .lightning_model import Uniad

__all__ = ["Uniad"]
