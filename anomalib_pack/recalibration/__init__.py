"""`python -m anomalib_pack recalibrate`: thresholds of a trained model, set anew from folders of images.

A map, in the order of the work::

    command.py      the command, and what is written
    measuring.py    raw scores of the images in a folder
    weights.py      weights of scores, chosen by cross-validation
    thresholds.py   thresholds and normalisation, from raw scores
    report.py       what it does to misses and false alarms
"""
