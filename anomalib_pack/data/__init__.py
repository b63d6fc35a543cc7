"""Datamodules and image classes with anomaly groups.

Map::

    grouped.py          image and batch with the group they belong to
    mvtec_loco.py       MVTec LOCO, groups logical and structural
    synthetic_loco.py   a rendered data set in MVTec LOCO's format, from
        tray.py, board.py   what its categories show, and what can be wrong with it
        parts.py            surfaces of small parts
        defects.py          names of defects, and structural damage
        rendering.py        canvas, light and camera
"""

from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.mvtec_loco import MVTecLoco, MVTecLocoDataset
from anomalib_pack.data.synthetic_loco import SyntheticLoco

__all__ = ["GroupedImageBatch", "GroupedImageItem", "MVTecLoco", "MVTecLocoDataset", "SyntheticLoco"]
