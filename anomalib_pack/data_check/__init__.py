"""`python -m anomalib_pack check`: one look at a data set before a training.

Map::

    command.py      arguments, and what is printed
    listing.py      datamodule -> images with their category, split and group, and their masks
    facts.py        what a file says when it is read once
    defects.py      what keeps sPRO from being computed
    findings.py     listing and facts -> errors and warnings
    report.py       the table, errors first
"""
