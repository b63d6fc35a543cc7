"""A callback that ends the process as a power cut would."""

import os
import signal

from lightning.pytorch import Callback


class KillInSecondEpoch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
