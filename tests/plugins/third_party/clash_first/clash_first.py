from anomalib.models import AnomalibModule


class Contested(AnomalibModule):
    trainer_arguments = learning_type = None
