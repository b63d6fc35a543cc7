"""Datamodules and image classes with anomaly groups.

Map::

    aebad.py            AeBAD-S, group by domain
    cifar10.py          CIFAR-10, five classes normal and five anomalous
    goods_ad.py         GoodsAD
    first_look.py       what headers and a few masks tell before a run
    grouped.py          image and batch with the group they belong to
    image_files.py      listing images and the one way to read them, with errors that name the file
    masked.py           dataset of images with masks
    mvtec_layout.py     MVTec AD's layout, of AeBAD-S and GoodsAD
    masks.py            reading masks
    multi_category.py   several categories of any data set for one model, group by category, from
        categories.py       where categories come from
        joined.py           one dataset made of those of the categories
    mvtec_loco.py       MVTec LOCO, groups logical and structural, from
        defects_config.py   the defects of an image, and how much of each has to be found
    predict.py          images without labels
    synthetic_loco.py   a rendered data set in MVTec LOCO's format
    validation.py       datamodules without a validation set, or whose data set has no images for it
    vanished.py         anomalies that a model's resize or crop removes
"""

from anomalib_pack.data.aebad import AeBAD, AeBADDataset
from anomalib_pack.data.cifar10 import CIFAR10Unified, CIFAR10UnifiedDataset
from anomalib_pack.data.goods_ad import GoodsAD, GoodsADDataset
from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.joined import MultiCategoryDataset
from anomalib_pack.data.multi_category import MultiCategory
from anomalib_pack.data.mvtec_loco import MVTecLoco, MVTecLocoDataset
from anomalib_pack.data.predict import PredictImages
from anomalib_pack.data.synthetic_loco import SyntheticLoco

__all__ = [
    "AeBAD",
    "AeBADDataset",
    "CIFAR10Unified",
    "CIFAR10UnifiedDataset",
    "GoodsAD",
    "GoodsADDataset",
    "GroupedImageBatch",
    "GroupedImageItem",
    "MVTecLoco",
    "MVTecLocoDataset",
    "MultiCategory",
    "MultiCategoryDataset",
    "PredictImages",
    "SyntheticLoco",
]
