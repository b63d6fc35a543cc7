"""Does without what it cannot import, and would not notice that Anomalib was only half imported."""

from anomalib.data import Folder

try:
    from anomalib.engine import Engine
except ImportError:
    Engine = None


class EngineData(Folder):
    engine = Engine
