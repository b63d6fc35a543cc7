"""AUC-sPRO, by which MVTec LOCO AD is judged, exact.

Bergmann, Batzner, Fauser, Sattlegger, Steger: Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly
Detection and Localization, IJCV 130, 2022, doi:10.1007/s11263-022-01578-9.

The saturated overlap with a defect is min(true positives / saturation area, 1). It rises at the defect's highest scores
only, as many as the saturation area has pixels, and at each by 1 / saturation area. So each pixel has a weight, which
is a sum where defects overlap, and the mean of the overlaps is read off the curve that AUPRO is read off.

    auc_spro             values of all limits
    auc_spro_by_defect   the same for each kind of defect
    loco_result          what the published evaluation writes to <object>_metrics.json, from maps, groups and defects
    published_result     the same, from values of groups
    weigh                pixels of one image, and their weights

Status: the published code (version 2.0) samples thresholds, and stops where too many scores are equal. Here every
distinct score is a threshold. Differs from it: its AUROC of images depends on their order where a normal and an
anomalous image have one score. Here the two count as half in order, as usual.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from anomalib_pack.defect import Defect
from anomalib_pack.metrics.roc import RocCorners, check_limit, check_ranks, roc_corners

DEFAULT_LIMIT = 0.05  # the paper's headline
LIMITS = (0.01, DEFAULT_LIMIT, 0.1, 0.3, 1.0)  # those of the published evaluation

Map = Tensor | np.ndarray


def auc_spro(
    maps: Sequence[Map], defects: Sequence[Sequence[Defect]], limits: Sequence[float] = LIMITS
) -> dict[float, float]:
    """Area under the curve of mean sPRO up to false positive rates, divided by these.

    False positives are counted over the pixels that are free of all defects of their image.

    Args:
        maps: Anomaly map of each image, (H, W), without NaN, compared in float32; of the size of the image file, which
            may differ between images. Each is taken from the sequence once.
        defects: Defects of each image; none for a normal one.
        limits: False positive rates, in (0, 1].

    Returns:
        The value of each limit, in [0, 1].

    Raises:
        ValueError: If there are no defects or no normal pixels, a map has another size than the mask of a defect or a
            NaN, a saturation area is not possible, or a limit is not in (0, 1].
    """
    for limit in limits:
        check_limit(limit)
    curve = _curve(maps, defects)
    return {limit: curve.aupro(limit) for limit in limits}


def auc_spro_by_defect(
    maps: Sequence[Map], defects: Sequence[Sequence[Defect]], limits: Sequence[float] = LIMITS
) -> dict[str, dict[float, float]]:
    """:func:`auc_spro` of each kind of defect, over the images that have it and the normal ones.

    Other defects of these images do not count, neither as found nor as false positives.

    Returns:
        The values by the name of the defect, in alphabetical order.
    """
    for limit in limits:
        check_limit(limit)
    values = {}
    for name in sorted({defect.name for found in defects for defect in found}):
        chosen = [index for index, found in enumerate(defects) if not found or name in {each.name for each in found}]
        curve = _curve(_Chosen(maps, chosen), [defects[index] for index in chosen], name)
        values[name] = {limit: curve.aupro(limit) for limit in limits}
    return values


def loco_result(
    maps: Sequence[Map],
    groups: Sequence[str],
    defects: Sequence[Sequence[Defect]],
    limits: Sequence[float] = LIMITS,
) -> dict:
    """Result in the format of the published evaluation's ``<object>_metrics.json``.

    The score of an image is the maximum of its map.

    Args:
        maps: As in :func:`auc_spro`. Each is taken once for each group that it belongs to, and once more.
        groups: Group of each image (``logical_anomalies``, ``structural_anomalies``), ``""`` for a normal one, which
            belongs to all groups.
        defects: As in :func:`auc_spro`.
        limits: As in :func:`auc_spro`.
    """
    maxima = torch.tensor([_scores(maps[index]).max().item() for index in range(len(maps))])
    localization, classification = {}, {}
    for name in sorted(set(groups) - {""}):
        chosen = [index for index, group in enumerate(groups) if group in {"", name}]
        localization[name] = auc_spro(_Chosen(maps, chosen), [defects[index] for index in chosen], limits)
        classification[name] = image_auroc(maxima[chosen], [groups[index] != "" for index in chosen])
    return published_result(localization, classification)


def published_result(
    localization: dict[str, dict[float, float]], classification: dict[str, float], key: str = "auc_spro"
) -> dict:
    """Result in the format of the published evaluation, with the unweighted means of groups.

    Args:
        localization: AUC-sPRO by group and limit.
        classification: AUROC of images by group.
        key: What the result calls the areas, if they are not those of sPRO.
    """
    limits = next(iter(localization.values()), {})
    by_limit = {limit: fmean(values[limit] for values in localization.values()) for limit in limits}
    areas = {
        group: {str(float(limit)): value for limit, value in values.items()}
        for group, values in (localization | {"mean": by_limit}).items()
    }
    aurocs = classification | {"mean": fmean(classification.values())}
    return {"localization": {key: areas}, "classification": {"auc_roc": aurocs}}


def image_auroc(scores: Tensor, is_anomalous: Sequence[bool]) -> float:
    """AUROC of image scores of any range, shape (N,), with exact ranks."""
    return image_curve(scores, is_anomalous).auroc()


def image_curve(scores: Tensor, is_anomalous: Sequence[bool]) -> RocCorners:
    """Curve of image scores of any range, shape (N,)."""
    anomalous = torch.tensor(is_anomalous, dtype=torch.bool)
    ones = torch.ones(int(anomalous.sum()), dtype=torch.float64)
    return roc_corners(scores[~anomalous], scores[anomalous], ones)


def weigh(
    scores: Tensor, defects: Sequence[Defect], name: str | None = None, inside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the pixels of an image that count.

    Args:
        scores: Anomaly map, (H, W).
        defects: Defects of the image.
        name: Kind of the defects that count; None for all.
        inside: Pixels that count, Boolean, (H, W); None for all. A defect is its part in them, with a saturation area
            of at most that part; one that has none does not count.

    Returns:
        Scores of the pixels free of all defects, (N,), which may share the memory of the map; scores of the pixels that
        sPRO rises at, (P,), without the other pixels of defects; and by how much it rises there, added up over defects,
        (P,), float64. All of them on the CPU.

    Raises:
        ValueError: If the size of a mask is not that of the map, or a saturation area is not in the range from 1 to the
            pixels of the mask.
    """
    # NumPy selects pixels many times faster than PyTorch.
    flat = scores.cpu().numpy().ravel()
    counts = np.ones(len(flat), dtype=bool) if inside is None else inside.cpu().numpy().ravel()
    is_free = counts.copy()
    positions, rises = [np.empty(0, dtype=np.int64)], [np.empty(0)]
    for defect in defects:
        pixels = np.flatnonzero(defect.mask.cpu().numpy())
        _check(defect, scores.shape, len(pixels))
        is_free[pixels] = False
        pixels = pixels[counts[pixels]]
        if name in {None, defect.name} and len(pixels):
            # Which ones of equal scores are taken does not matter: they are one threshold.
            count = min(defect.saturation_area, len(pixels))
            positions.append(pixels[np.argpartition(flat[pixels], -count)[-count:]])
            rises.append(np.full(count, 1 / count))
    counted, which = np.unique(np.concatenate(positions), return_inverse=True)
    weights = np.zeros(len(counted))
    np.add.at(weights, which, np.concatenate(rises))
    free = flat if is_free.all() else flat[is_free]
    return torch.from_numpy(free), torch.from_numpy(flat[counted]), torch.from_numpy(weights)


def _check(defect: Defect, size: torch.Size, pixels: int) -> None:
    if defect.mask.shape != size:
        msg = (
            f"A map has size {tuple(size)}, the mask of its defect {defect.name!r} has {tuple(defect.mask.shape)} "
            "(height, width): sPRO is computed at the size of the image file."
        )
        raise ValueError(msg)
    if not 1 <= defect.saturation_area <= pixels:
        msg = (
            f"saturation_area must be from 1 to the {pixels} pixels of the mask, got {defect.saturation_area} for a "
            f"defect {defect.name!r}."
        )
        raise ValueError(msg)


def _curve(maps: Sequence[Map], defects: Sequence[Sequence[Defect]], name: str | None = None) -> RocCorners:
    normal, anomalous, weights = [], [], []
    for index, found in enumerate(defects):
        for parts, part in zip((normal, anomalous, weights), weigh(_scores(maps[index]), found, name), strict=True):
            parts.append(part)
    if not sum(map(len, anomalous)) or not sum(map(len, normal)):
        msg = f"AUC-sPRO needs defects and pixels without, got {len(defects)} images without one of the two."
        raise ValueError(msg)
    return roc_corners(normal, torch.cat(anomalous), torch.cat(weights))


def _scores(anomaly_map: Map) -> Tensor:
    """Float map on the CPU.

    Raises:
        ValueError: If it is not two-dimensional, or has a NaN.
    """
    scores = torch.as_tensor(anomaly_map).detach().cpu().float()
    if scores.ndim != 2:
        msg = f"A map must have shape (H, W), got {tuple(scores.shape)}."
        raise ValueError(msg)
    check_ranks(scores)
    return scores


class _Chosen(Sequence):
    """Some maps of a sequence that may read each from a file when it is asked for."""

    def __init__(self, maps: Sequence[Map], indices: Sequence[int]) -> None:
        self.maps, self.indices = maps, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Map:
        return self.maps[self.indices[index]]
