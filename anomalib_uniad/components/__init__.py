"""Parts of UniAD's reconstruction network.

Map::

    positions.py      where a token stands: learned or sine embedding
    attention.py      attention that leaves out a token's neighbours
    dropout.py        dropout that is quick on a CPU
    transformer.py    encoder and decoder layers
    baselines.py      MLP and CNN instead of the transformer
"""

from .attention import Attention, neighbor_mask
from .baselines import Cnn, Mlp
from .positions import LearnedPositions, SinePositions
from .transformer import DECODERS, Transformer

__all__ = ["DECODERS", "Attention", "Cnn", "LearnedPositions", "Mlp", "SinePositions", "Transformer", "neighbor_mask"]
