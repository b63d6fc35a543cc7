from anomalib.models import AnomalibModule


class Inner(AnomalibModule):
    trainer_arguments = learning_type = None
