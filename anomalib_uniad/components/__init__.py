"""Parts of UniAD's transformer.

Map::

    positions.py      where a token stands: learned or sine embedding
    attention.py      attention that leaves out a token's neighbours
    transformer.py    encoder and decoder layers
"""

from .attention import Attention, neighbor_mask
from .positions import LearnedPositions, SinePositions
from .transformer import Transformer

__all__ = ["Attention", "LearnedPositions", "SinePositions", "Transformer", "neighbor_mask"]
