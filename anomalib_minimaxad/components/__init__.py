"""Encoders and blocks of MiniMaxAD.

- ``blocks.py``: UniRepLKNet's block with its branches, and its merged copy.
- ``encoder.py``: the frozen encoders and their weights.
"""

from .blocks import Block, ChannelNorm, FoldedSequential, GlobalResponseNorm
from .encoder import VARIANTS, TimmEncoder, UniRepLKNet, build_encoder, stages

__all__ = [
    "VARIANTS",
    "Block",
    "ChannelNorm",
    "FoldedSequential",
    "GlobalResponseNorm",
    "TimmEncoder",
    "UniRepLKNet",
    "build_encoder",
    "stages",
]
