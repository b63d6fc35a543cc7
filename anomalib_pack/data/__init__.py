"""Datamodules and image classes with anomaly groups.

Map::

    cifar10.py          CIFAR-10, five classes normal and five anomalous
    grouped.py          image and batch with the group they belong to
    multi_category.py   several categories of any data set for one model, group by category, from
        categories.py       where categories come from
        joined.py           one dataset made of those of the categories
    mvtec_loco.py       MVTec LOCO, groups logical and structural
    synthetic_loco.py   a rendered data set in MVTec LOCO's format, from
        tray.py, board.py   what its categories show, and what can be wrong with it
        parts.py            surfaces of small parts
        defects.py          names of defects, and structural damage
        rendering.py        canvas, light and camera
"""

from anomalib_pack.data.cifar10 import CIFAR10Unified, CIFAR10UnifiedDataset
from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.joined import MultiCategoryDataset
from anomalib_pack.data.multi_category import MultiCategory
from anomalib_pack.data.mvtec_loco import MVTecLoco, MVTecLocoDataset
from anomalib_pack.data.synthetic_loco import SyntheticLoco

__all__ = [
    "CIFAR10Unified",
    "CIFAR10UnifiedDataset",
    "GroupedImageBatch",
    "GroupedImageItem",
    "MVTecLoco",
    "MVTecLocoDataset",
    "MultiCategory",
    "MultiCategoryDataset",
    "SyntheticLoco",
]
