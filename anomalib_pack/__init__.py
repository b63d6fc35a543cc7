"""Anomaly detectors that plug into a stock Anomalib: what the methods share.

Importing this package registers every plugin with Anomalib, also where the start-up line is switched off or not run.

A map::

    Into Anomalib
        plugins.py          entry points -> anomalib.models, anomalib.data, the subcommands of `anomalib`
        _autoload.py        notices when Anomalib is imported; started by the line in `anomalib_pack.pth`

    Data
        data/               datamodules, and their images
        rendering/          the pictures of the rendered data set
        defect.py           a defect of an image, as MVTec LOCO counts it
        reading.py          refusing images that Anomalib's reader would misread
        data_check/         `python -m anomalib_pack check`: one look at a data set

    Models
        defaults.py         what the models choose alike where Anomalib lets a model choose
        checks.py           checks of arguments and data, before an epoch is wasted
        backbones.py        frozen features of a timm network
        neighbors.py        nearest neighbours in a memory bank, exact or approximate
        coreset.py          what is kept in one
        tiling.py           large images in tiles
        region.py           what of an image is inspected, so that nothing else counts
        blur.py             Gaussian blur of maps
        folding.py          networks with BatchNorms folded into convolutions for inference
        packing.py          weights in the layout in which a CPU computes, and products with them
        precision.py        what stays in float32 in a network of half precision
        explaining.py       which branch of a model fired, in words

    Training
        training.py         how long models train, when they validate, and that a loss must be a number
        passes.py           one pass over a data set outside the training loop
        feature_cache.py    features of a frozen network, computed once in a training
        feature_store.py    their place in memory or on disk, one for all processes of a machine
        resuming.py         what is trained is kept when the training is interrupted or fails
        callbacks.py        callbacks for any model
        progress.py         bars, or lines where there is no terminal

    Checkpoints
        checkpoints.py      what a model takes from a checkpoint, and that it says so
        restoring.py        a model from a checkpoint file alone
        remeasuring.py      measurements of a checkpoint, for a model with other values
        recalibration/      `python -m anomalib_pack recalibrate`: thresholds of a trained model, set anew

    Results
        post_processing.py  scores -> normalised scores and decisions
        metrics/            evaluators that report per group
        pictures.py         pictures that never cost the metrics
        records/            what a run finds in each image: predictions and defects as tables
        report/             `anomalib report`: one HTML file of runs, with a threshold that can be moved
        evaluation/         anomaly maps as files, and `python -m anomalib_pack evaluate`: their metrics

    Inspection
        inspector.py        a trained model that takes frames of a camera, from a checkpoint or an exported file
        frames.py           frames, read as the engine reads image files
        runtimes.py         models in PyTorch, ONNX Runtime and OpenVINO behind one call
        exporting.py        exports that see image files as the engine does
        quantizing.py       OpenVINO models in INT8
        metadata.py         what an exported file says of itself

    Many models
        sweep/              `anomalib sweep`: many models, data sets and seeds
        efficiency/         `anomalib efficiency`: latency, throughput, parameters, FLOPs, memory
        on_node.py          a job of a sweep on a node of a cluster, which imports little
        process.py          a process of its own for each piece of work

    Small tools
        files.py            files and folders that are whole or absent
        loggers.py          other libraries' loggers, for a while
        tables.py           tables as plain text
        statistics.py       mean and deviation of channels over many images
        quantiles.py        quantiles of any number of scores
        shares.py           how many a share of some are

Commands: `python -m anomalib_pack NAME` is the `command.py` of a folder, named in `__main__.py`; `anomalib NAME` is the
`pipeline.py` of a folder, named in `pyproject.toml`.

A method package (`anomalib_ulsad`, ...) uses these; nothing here knows a method. Import from the modules: this file
runs whenever Python starts, so it imports nothing else. `anomalib_pack.Inspector` is imported when it is asked for.
"""

from anomalib_pack import _autoload

_autoload.install()


def __getattr__(name: str) -> type:
    if name == "Inspector":
        from anomalib_pack.inspector import Inspector  # noqa: PLC0415  # see above

        return Inspector
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
