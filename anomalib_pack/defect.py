"""One annotated defect of a test image, as MVTec LOCO's evaluation counts it.

A data set of such images has a method ``defects``, which reads those of an image by its path: see
:meth:`~anomalib_pack.data.MVTecLocoDataset.defects`. Others have none, or ``None`` in its place.
"""

from typing import NamedTuple

from torch import Tensor


class Defect(NamedTuple):
    """A defect of an image; the defects of an image may overlap.

    Attributes:
        name: Kind of the defect, ``defect_name`` in ``defects_config.json``.
        mask: Its pixels, a boolean tensor (H, W) of the size of the image FILE.
        saturation_area: Number of pixels, at least 1 and at most those of the mask, from which on the defect counts as
            found: Beyond Dents and Scratches (Bergmann et al., IJCV 2022), Sec. 4.
    """

    name: str
    mask: Tensor
    saturation_area: int
