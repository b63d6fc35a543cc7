"""Distillation of a teacher for EfficientAD (Algorithm 3 of the supplement).

``torch_model.py`` has the features that the teacher learns, ``lightning_model.py`` the training, ``command.py`` the
command that runs it over a folder of images.
"""

from .command import distill
from .lightning_model import TeacherDistillation
from .torch_model import PatchFeatures

__all__ = ["PatchFeatures", "TeacherDistillation", "distill"]
