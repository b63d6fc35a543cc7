"""Small distillations; script: python kill_distillation.py IMAGES OUT STEPS STEP, which a power cut ends at a step."""

import os
import signal
import sys
from pathlib import Path

from anomalib_efficientad.distillation import TeacherDistillation, command

DISTIL = {  # a random backbone, few channels, small images
    "backbone": "resnet18",
    "layers": ["layer1", "layer2"],
    "weights": None,
    "batch_size": 2,
    "image_size": 32,
    "out_channels": 8,
    "statistics_images": 4,
    "num_workers": 0,
    "accelerator": "cpu",
}


def main() -> None:
    images, out, steps, last = sys.argv[1:]

    class Killed(TeacherDistillation):
        def training_step(self, batch, batch_idx):
            if self.global_step == int(last):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch, batch_idx)

    command.TeacherDistillation = Killed
    command.distill(Path(images), Path(out), steps=int(steps), **DISTIL)


if __name__ == "__main__":
    main()
