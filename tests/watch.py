"""What a training does, seen from outside."""

from lightning.pytorch import Callback


class Watch(Callback):
    """Keeps the learning rates, the epochs that were validated and how long training was to be."""

    def __init__(self) -> None:
        self.rates, self.validated = [], []

    def on_train_start(self, trainer, *_) -> None:
        self.epochs = trainer.max_epochs

    def on_train_batch_start(self, trainer, *_) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer, *_) -> None:
        self.validated.append(trainer.current_epoch)
