"""Anomaly maps as files, and `python -m anomalib_pack evaluate`: metrics of maps that any toolbox has written.

Map::

    layout.py       where the map of an image lies
    map_file.py     reading and writing a map
    write_maps.py   the callback that writes the maps of a run
    submission.py   what the server of MVTec AD 2 takes
    images.py       the test images of a category with their maps, masks and defects, read when asked for
    results.py      metrics of a category
    command.py      arguments, and what is printed and written
"""
