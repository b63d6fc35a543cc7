"""ULSAD: logical and structural anomalies by deep feature reconstruction (Patra & Ben Taieb, TMLR 2024)."""

from .lightning_model import Ulsad
from .visualizer import BranchVisualizer

__all__ = ["BranchVisualizer", "Ulsad"]
