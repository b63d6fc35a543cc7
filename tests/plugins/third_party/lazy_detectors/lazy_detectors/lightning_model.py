from anomalib.models import AnomalibModule


class Lazy(AnomalibModule):
    trainer_arguments = learning_type = None
