"""Draws the pictures of :class:`~anomalib_pack.data.SyntheticLoco`.

Map::

    writing.py          images and masks as files
    tray.py, board.py   what the categories show, and what can be wrong with it
    parts.py            surfaces of small parts
    defects.py          kinds of defects, and structural damage
    canvas.py           canvas, light and camera
"""
