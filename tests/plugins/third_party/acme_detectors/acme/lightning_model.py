from acme_common import SCALE
from anomalib import LearningType
from anomalib.models import AnomalibModule

from .torch_model import AcmeTorchModel


class AcmeModel(AnomalibModule):
    """A model of a third party."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(pre_processor=False, post_processor=False, evaluator=False, visualizer=False)
        self.model = AcmeTorchModel(width, SCALE)

    @property
    def trainer_arguments(self) -> dict:
        return {}

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS
