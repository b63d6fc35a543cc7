"""ULSAD: logical and structural anomalies by deep feature reconstruction (Patra & Ben Taieb, TMLR 2024)."""

from .lightning_model import Ulsad

__all__ = ["Ulsad"]
