"""MiniMaxAD: many classes with one light autoencoder of large-kernel convolutions (Wang et al., 2024)."""

from .lightning_model import MiniMaxAd

__all__ = ["MiniMaxAd"]
