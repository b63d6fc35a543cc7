"""Importing this leaves two modules half imported when Anomalib's hook runs."""

import chain_inner  # isort: skip  # first, so that it is half imported too
from anomalib.models import AnomalibModule


class Outer(AnomalibModule):
    trainer_arguments = learning_type = None
    inner = chain_inner.Inner
