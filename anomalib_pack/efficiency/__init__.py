"""What a model costs: ``anomalib efficiency --config configs/efficiency/all.yaml``.

Latency, throughput, parameters, FLOPs and memory of any of Anomalib's or its plugins' models, as the EfficientAD paper
measures them (Batzner et al., "EfficientAD", WACV 2024, supplement, section 5).

From the outside in::

    pipeline.py     the subcommand: one model after another, results after each
    settings.py     what a configuration may say
    measurement.py  all that is measured on one model
    formats.py      what is measured on a model's files: Torch, ONNX, OpenVINO
    inspection.py   latency from a frame of a camera to its defects
    models.py       a model as measured: fresh, from a checkpoint, or fitted where it has a memory bank
    timing.py       timed passes: latency and throughput
    complexity.py   parameters and FLOPs
    memory.py       peak memory, and the size of a memory bank
    environment.py  device and versions
    accuracy.py     a metric of each model, read from another run's results
    report.py       CSV, Markdown and console tables
    plot.py         latency against accuracy
"""

from anomalib_pack.efficiency.pipeline import Efficiency

__all__ = ["Efficiency"]
