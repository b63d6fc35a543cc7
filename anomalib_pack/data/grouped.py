"""Images that carry the group their metrics belong to.

A group is the kind of anomaly (``logical_anomalies``, ``structural_anomalies``) or, with one model over several
categories, the category. Anomalib's own image classes have no field for it, so nothing downstream of the dataset could
report metrics per group.

Two images carry the same field in two containers::

    GroupedImageItem  --collate-->  GroupedImageBatch  --iteration-->  GroupedImageItem
           |                               |
        to_numpy                        to_numpy
           v                               v
    NumpyGroupedImageItem           NumpyGroupedImageBatch
"""

from dataclasses import dataclass
from typing import ClassVar

from anomalib.data.dataclasses.numpy.image import NumpyImageBatch, NumpyImageItem
from anomalib.data.dataclasses.torch.image import ImageBatch, ImageItem


@dataclass
class NumpyGroupedImageItem(NumpyImageItem):
    """:class:`GroupedImageItem` with NumPy arrays in place of tensors."""

    group: str | None = None


@dataclass
class NumpyGroupedImageBatch(NumpyImageBatch):
    """:class:`GroupedImageBatch` with NumPy arrays in place of tensors."""

    item_class: ClassVar[type[NumpyGroupedImageItem]] = NumpyGroupedImageItem

    group: list[str] | None = None


@dataclass
class GroupedImageItem(ImageItem):
    """One image and the group it belongs to.

    ``group`` is a name, or the empty string for an image that belongs to every group: the normal test images of MVTec
    LOCO are the negatives of the logical and of the structural anomalies alike. With several categories it is the start
    of the names of all groups that the image belongs to, ``"pushpins/"``. ``None`` means that groups are not in
    use. Within one dataset either every image has a group or none has: Anomalib's ``collate`` takes the fields that
    its first image has.

    ``mask_path`` may be the empty string, for an image without a mask. Anomalib's own item turns it into ``None``,
    which makes the field vanish from a batch whose first image is normal and ``"None"`` in any other.
    """

    numpy_class: ClassVar[type[NumpyGroupedImageItem]] = NumpyGroupedImageItem

    group: str | None = None

    @staticmethod
    def validate_mask_path(mask_path: str | None) -> str | None:
        """Keep the empty string, so that the mask paths of a batch stay in step with its images."""
        return "" if mask_path == "" else ImageItem.validate_mask_path(mask_path)


@dataclass
class GroupedImageBatch(ImageBatch):
    """Images and the group of each, in the order of the images; see :class:`GroupedImageItem`.

    Example:
        >>> import torch
        >>> items = [GroupedImageItem(image=torch.rand(3, 8, 8), group=group) for group in ("", "logical_anomalies")]
        >>> batch = GroupedImageBatch.collate(items)
        >>> batch.group
        ['', 'logical_anomalies']
        >>> [item.group for item in batch]
        ['', 'logical_anomalies']
    """

    item_class: ClassVar[type[GroupedImageItem]] = GroupedImageItem
    numpy_class: ClassVar[type[NumpyGroupedImageBatch]] = NumpyGroupedImageBatch

    group: list[str] | None = None
