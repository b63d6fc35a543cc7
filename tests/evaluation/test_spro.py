"""AUC-sPRO against the published evaluation's numbers, a slow reference, and values worked by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_pack.defect import Defect
from anomalib_pack.metrics import pixel
from anomalib_pack.metrics.spro import LIMITS, auc_spro, auc_spro_by_defect, loco_result

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "spro_a.npz"
GROUPS = ("logical_anomalies", "structural_anomalies")


@pytest.fixture(scope="module")
def golden():
    """Maps, groups and defects of all images, and what the published code says of them."""
    about = json.loads(GOLDEN.with_suffix(".json").read_text())
    kinds = {kind["pixel_value"]: kind for kind in about["defects_config"]}
    maps, groups, defects = [], [], []
    with np.load(GOLDEN, allow_pickle=False) as file:
        for image in about["images"]:
            index = image["index"]
            maps.append(file[f"map/{index}"])
            groups.append(image["group"].replace("good", ""))
            masks = [file[f"mask/{index}/{number}"] for number in range(image["masks"])]
            defects.append([defect(mask, kinds[mask.max()]) for mask in masks])
    return SimpleNamespace(maps=maps, groups=groups, defects=defects, **about)


def defect(mask, kind):
    area, threshold = int((mask > 0).sum()), kind["saturation_threshold"]
    saturation = int(threshold * area) if kind["relative_saturation"] else min(threshold, area)
    return Defect(kind["defect_name"], torch.from_numpy(mask > 0), saturation)


needs_golden = [
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference numbers of the published code are not here"),
]


class TestPublished:
    pytestmark = needs_golden

    def test_groups(self, golden):
        found = loco_result(golden.maps, golden.groups, golden.defects)
        assert found["localization"]["auc_spro"].keys() == golden.auc_spro_exact.keys()
        for group, values in golden.auc_spro_exact.items():
            assert found["localization"]["auc_spro"][group] == pytest.approx(values, abs=1e-6)

    def test_images(self, golden):
        """Of the structural ones three have the maximum of a normal image; there the published code counts too much."""
        found = loco_result(golden.maps, golden.groups, golden.defects)["classification"]["auc_roc"]
        maxima, groups = np.array([image.max() for image in golden.maps]), np.array(golden.groups)
        for group, ties in zip(GROUPS, (0, 3), strict=True):
            chosen = np.isin(groups, ["", group])
            expected = roc_auc_score(groups[chosen] != "", maxima[chosen])
            assert (maxima[groups == group][:, None] == maxima[groups == ""]).sum() == ties
            assert found[group] == pytest.approx(expected, abs=1e-6)
            assert (found[group] == pytest.approx(golden.classification["auc_roc"][group], abs=1e-6)) == (ties == 0)

    def test_kinds_of_defects(self, golden):
        found = auc_spro_by_defect(golden.maps, golden.defects)
        expected = golden.auc_spro_exact_per_defect_name
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert {str(limit): value for limit, value in found[name].items()} == pytest.approx(values, abs=1e-6)

    @pytest.mark.parametrize("limit", LIMITS)
    def test_metric(self, golden, limit):
        for group in GROUPS:
            metric = pixel.SPRO(fpr_limit=limit)
            for anomaly_map, defects, member in zip(golden.maps, golden.defects, golden.groups, strict=True):
                if member in {"", group}:
                    metric.update(SimpleNamespace(anomaly_map=torch.tensor(anomaly_map)[None], defects=[defects]))
            assert metric.compute().item() == pytest.approx(golden.auc_spro_exact[group][str(limit)], abs=1e-6)


def slow_auc_spro(maps, defects, limit, name=None):
    """Area under mean sPRO against false positive rate, by a threshold at each score of each image."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([image.ravel() for image in maps]))[::-1]:
        false_positives = negatives = 0
        overlaps = []
        for image, found in zip(maps, defects, strict=True):
            free = np.ones(image.shape, bool)
            for each in found:
                free &= ~each.mask.numpy()
                if name in {None, each.name}:
                    true_positives = (image[each.mask.numpy()] >= threshold).sum()
                    overlaps.append(min(true_positives / each.saturation_area, 1))
            false_positives += (image[free] >= threshold).sum()
            negatives += free.sum()
        points.append((false_positives / negatives, np.mean(overlaps)))
    rates, heights = np.array(points).T
    at_limit = heights[rates == limit].max() if limit in rates else np.interp(limit, rates, heights)
    inside = rates <= limit
    return np.trapezoid([*heights[inside], at_limit], [*rates[inside], limit]) / limit


def made_up(decimals):
    """Maps of two sizes, and defects that overlap, saturate at once, at half of their pixels, or at all of them."""
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 14, 18), bool)
    masks[0, 2:7, 3:9] = masks[1, 4:9, 6:12] = masks[2, 4:6, 6:8] = masks[3, 0:2, 0:9] = True
    first = [Defect("hole", masks[0], 15), Defect("scratch", masks[1], 30), Defect("scratch", masks[2], 1)]
    second = [Defect("hole", masks[3], 18)]
    third = [Defect("stain", masks[2, :9, :11], 2)]
    defects = [
        [each._replace(mask=torch.from_numpy(each.mask)) for each in found] for found in (first, second, [], third)
    ]
    sizes = [(14, 18), (14, 18), (14, 18), (9, 11)]
    maps = [rng.normal(size=size) for size in sizes]
    maps = [sum((1.2 * each.mask.numpy() for each in found), image) for image, found in zip(maps, defects, strict=True)]
    return [image.round(decimals).astype(np.float32) for image in maps], defects


@pytest.mark.parametrize("decimals", [6, 1, 0])
def test_slow_reference(decimals):
    """The fewer decimals, the more equal scores, at which the published code stops."""
    maps, defects = made_up(decimals)
    expected = {limit: slow_auc_spro(maps, defects, limit) for limit in LIMITS}
    assert auc_spro(maps, defects) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected[0.1] < 0.9
    found = auc_spro_by_defect(maps, defects)
    assert list(found) == ["hole", "scratch", "stain"]
    chosen = {"hole": [0, 1, 2], "scratch": [0, 2], "stain": [2, 3]}
    for name, images in chosen.items():
        part = [maps[index] for index in images], [defects[index] for index in images]
        expected = {limit: slow_auc_spro(*part, limit, name) for limit in LIMITS}
        assert found[name] == pytest.approx(expected, abs=1e-9)


def test_by_hand():
    """Two of three pixels saturate. The normal ones are 0.8 and 0.3, which is half of them each."""
    mask = torch.tensor([[True, True, True, False, False]])
    found = auc_spro([torch.tensor([[0.9, 0.5, 0.1, 0.8, 0.3]])], [[Defect("hole", mask, 2)]], [0.25, 0.5, 1.0])
    # 1/2 until the first false positive, and 1 from there on.
    assert found == pytest.approx({0.25: 0.5, 0.5: 0.5, 1.0: (0.5 * 0.5 + 0.5 * 1) / 1})


def test_all_scores_equal():
    """One threshold: the line from nothing to everything."""
    maps, defects = made_up(6)
    found = auc_spro([np.full_like(image, 7) for image in maps], defects)
    assert found == pytest.approx({limit: limit / 2 for limit in LIMITS})


def test_saturation_of_whole_components_is_aupro():
    """Defects apart from each other, each to be found as a whole, are regions."""
    maps, _ = made_up(2)
    masks = torch.zeros(3, 14, 18, dtype=torch.bool)
    masks[0, 1:5, 1:5] = masks[0, 8:11, 10:17] = masks[2, 3, 3] = True
    parts = [[masks[0] & (torch.arange(14) < 6)[:, None], masks[0] & (torch.arange(14) >= 6)[:, None]], [], [masks[2]]]
    defects = [[Defect("hole", part, int(part.sum())) for part in found] for found in parts]
    maps = torch.from_numpy(np.stack(maps[:3]))
    for limit in (0.05, 0.3):
        aupro, spro = pixel.AUPRO(fpr_limit=limit), pixel.SPRO(fpr_limit=limit)
        aupro.update(SimpleNamespace(anomaly_map=maps, gt_mask=masks))
        spro.update(SimpleNamespace(anomaly_map=maps, defects=defects))
        assert spro.compute().item() == pytest.approx(aupro.compute().item(), abs=1e-9)


def test_names():
    assert pixel.SPRO(prefix="pixel_").name == "pixel_SPRO"
    assert pixel.SPRO(fpr_limit=0.3, prefix="pixel_").name == "pixel_SPRO_0.3"
    assert pixel.AUROC(fpr_limit=0.05, prefix="pixel_").name == "pixel_AUROC_0.05"


def test_result_is_read_from_the_maps():
    """Half of each group; the score of an image is its maximum, whatever its range."""
    maps, defects = made_up(6)
    maps = [image + 40 for image in maps]
    groups = ["logical_anomalies", "structural_anomalies", "", "logical_anomalies"]
    found = loco_result(maps, groups, defects)
    for index, group in ((1, GROUPS[1]), (slice(0, 4, 3), GROUPS[0])):
        part = [[values[index]] if isinstance(index, int) else values[index] for values in (maps, defects)]
        expected = slow_auc_spro([*part[0], maps[2]], [*part[1], []], 0.05)
        assert found["localization"]["auc_spro"][group]["0.05"] == pytest.approx(expected, abs=1e-9)
        expected = np.mean([image.max() > maps[2].max() for image in part[0]])
        assert found["classification"]["auc_roc"][group] == pytest.approx(expected)
    for values in (*found["localization"].values(), *found["classification"].values()):
        limits = {"0.01", "0.05", "0.1", "0.3", "1.0"}
        first, second, mean = (values[group] for group in (*GROUPS, "mean"))
        if isinstance(mean, dict):
            assert mean.keys() == limits
            first, second, mean = (each["0.3"] for each in (first, second, mean))
        assert mean == pytest.approx((first + second) / 2)


def test_impossible_input():
    maps, defects = made_up(6)
    with pytest.raises(ValueError, match=r"size \(14, 18\), the mask of its defect 'stain' has \(9, 11\)"):
        auc_spro(maps[:1], defects[3:])
    for area in (0, 31):
        with pytest.raises(ValueError, match=f"from 1 to the 30 pixels of the mask, got {area} for a defect 'hole'"):
            auc_spro(maps[:1], [[defects[0][0]._replace(saturation_area=area)]])
    with pytest.raises(ValueError, match="needs defects and pixels without, got 1 images"):
        auc_spro(maps[2:3], defects[2:3])
    with pytest.raises(ValueError, match=r"fpr_limit must be in \(0, 1\], got 0"):
        auc_spro(maps, defects, [0])
    with pytest.raises(ValueError, match="1 of 252 pixel scores are NaN"):
        auc_spro([np.where(maps[0] == maps[0].max(), np.nan, maps[0])], defects[:1])
    with pytest.raises(ValueError, match=r"must have shape \(H, W\), got \(1, 14, 18\)"):
        auc_spro([maps[0][None]], defects[:1])
