"""The pack's metrics against values worked by hand, scikit-learn, and Anomalib's own classes."""

from types import SimpleNamespace

import anomalib.metrics
import numpy as np
import pytest
import torch
from anomalib.metrics.pro import connected_components_cpu
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from anomalib_pack.metrics import image, pixel, roc

# Ours and Anomalib's; its AUPR is the average precision.
PAIRS = [("AUROC", "AUROC"), ("AP", "AUPR"), ("F1Max", "F1Max"), ("AUPRO", "AUPRO")]


def compute(metric, *batches):
    for maps, masks in batches:
        metric.update(SimpleNamespace(anomaly_map=maps, gt_mask=masks))
    return metric.compute().item()


def ours(*batches):
    """All four metrics by name."""
    return {name: compute(getattr(pixel, name)(), *batches) for name, _ in PAIRS}


def stock(*batches):
    """Anomalib's values under our names."""
    fields = ["anomaly_map", "gt_mask"]
    return {name: compute(getattr(anomalib.metrics, theirs)(fields=fields), *batches) for name, theirs in PAIRS}


@pytest.fixture
def maps_and_masks():
    """Maps in [0, 1] of six images, with up to three regions, one of which hangs together by a corner only."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(6, 24, 32, dtype=torch.bool)
    masks[1:4, 2:8, 3:14] = True
    masks[2:5, 20:23, 25:29] = True
    masks[2, 8:10, 14:16] = True
    masks[4, 0, 0] = True
    maps = 0.7 * torch.rand(6, 24, 32, generator=generator) + 0.2 * masks
    return maps.unsqueeze(1), masks


def test_by_hand():
    """One region of one pixel and one of two; one of its pixels has the score of a normal one."""
    maps = torch.tensor([[[0.9, 0.6, 0.6, 0.3, 0.8, 0.2, 0.1, 0.1]]])
    masks = torch.tensor([[[True, False, True, True, False, False, False, False]]])
    expected = {
        # Normal pixels below each anomalous one: 5, 3.5 with the equal one as half, and 3, of 5.
        "AUROC": 11.5 / 15,
        # Precision at 0.9, 0.6 and 0.3, each of which raises recall by a third.
        "AP": (1 / 1 + 2 / 4 + 3 / 5) / 3,
        # At 0.3: three true and two false positives.
        "F1Max": 2 * 3 / (5 + 3),
        # The limit is 1.5 of 5 normal pixels. Mean overlap is 1/2 up to the first and rises to 3/4 at the second.
        "AUPRO": (1 * 1 / 2 + 0.5 * (1 / 2 + 5 / 8) / 2) / 1.5,
    }
    assert ours((maps, masks)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("decimals", [6, 2, 1, 0], ids=lambda decimals: f"{decimals} decimals")
def test_as_other_libraries(decimals, maps_and_masks):
    """The fewer decimals, the more ties; without any, scores are 0 and 1."""
    maps, masks = maps_and_masks
    batch = maps.round(decimals=decimals), masks
    found = ours(batch)
    # Anomalib adds up in float32; scikit-learn's values below are float64.
    assert found == pytest.approx(stock(batch), abs=1e-6)
    truth, scores = masks.flatten().numpy(), batch[0].flatten().numpy()
    precision, recall, _ = precision_recall_curve(truth, scores)
    assert found["AUROC"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-7)
    assert found["AP"] == pytest.approx(average_precision_score(truth, scores), abs=1e-7)
    assert found["F1Max"] == pytest.approx((2 * precision * recall / (precision + recall + 1e-30)).max(), abs=1e-7)


@pytest.mark.parametrize("fpr_limit", [0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("decimals", [6, 1])
def test_aupro_limits(fpr_limit, decimals, maps_and_masks):
    maps, masks = maps_and_masks
    batch = maps.round(decimals=decimals), masks
    expected = compute(anomalib.metrics.AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=fpr_limit), batch)
    assert compute(pixel.AUPRO(fpr_limit=fpr_limit), batch) == pytest.approx(expected, abs=1e-6)


def slow_aupro_of_image(scores, mask):
    """Area under mean overlap against false positive rate, by a threshold at each score, up to 0.3."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    points = [(0.0, 0.0)]
    for threshold in np.unique(scores)[::-1]:
        found = scores >= threshold
        overlaps = [found[labels == region].mean() for region in range(1, count + 1)]
        points.append((found[~mask].mean(), np.mean(overlaps)))
    rates, overlaps = np.array(points).T
    limit = np.interp(0.3, rates, overlaps) if 0.3 not in rates else overlaps[rates == 0.3].max()
    inside = rates <= 0.3
    return np.trapezoid([*overlaps[inside], limit], [*rates[inside], 0.3]) / 0.3


@pytest.mark.parametrize("decimals", [6, 1, 0])
def test_aupro_per_image(decimals, maps_and_masks):
    """Each of the anomalous images, of which one has two regions more than another, has the same weight."""
    maps, masks = maps_and_masks[0].round(decimals=decimals), maps_and_masks[1]
    maps[3] *= 3  # would shift a common threshold
    expected = [
        slow_aupro_of_image(image[0].numpy(), mask.numpy())
        for image, mask in zip(maps, masks, strict=True)
        if mask.any()
    ]
    assert len(expected) == 4
    found = compute(pixel.AUPROPerImage(), (maps, masks))
    assert found == pytest.approx(np.mean(expected), abs=1e-6)
    assert found != pytest.approx(compute(pixel.AUPRO(), (maps, masks)), abs=1e-3)
    parts = [(maps[part], masks[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert compute(pixel.AUPROPerImage(), *parts) == pytest.approx(found, abs=1e-7)


def test_aupro_per_image_is_the_pooled_one_of_a_single_image(maps_and_masks):
    maps, masks = (part[2:3] for part in maps_and_masks)
    assert compute(pixel.AUPROPerImage(), (maps, masks)) == pytest.approx(
        compute(pixel.AUPRO(), (maps, masks)), abs=1e-7
    )


@pytest.mark.parametrize("value", [False, True])
def test_aupro_per_image_of_one_kind_of_pixels(value, maps_and_masks):
    maps, masks = maps_and_masks
    with pytest.warns(UserWarning, match="no images with normal and anomalous pixels"):
        assert compute(pixel.AUPROPerImage(), (maps, torch.full_like(masks, value))) == 0
    expected = compute(pixel.AUPROPerImage(), (maps, masks))
    masks[5] = value
    assert compute(pixel.AUPROPerImage(), (maps, masks)) == expected


def test_equal_scores(maps_and_masks):
    """One threshold, which is everything or nothing."""
    maps, masks = maps_and_masks
    share = masks.float().mean().item()
    expected = {"AUROC": 0.5, "AP": share, "F1Max": 2 * share / (1 + share), "AUPRO": 0.3 / 2}
    assert ours((torch.full_like(maps, 0.4), masks)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("part", [2**25, 700, 5000])
def test_batches_do_not_matter(part, maps_and_masks, monkeypatch):
    """Nor does how many scores are sorted at a time, of 4608."""
    maps, masks = maps_and_masks
    maps = maps.round(decimals=2)
    whole = ours((maps, masks))
    monkeypatch.setattr(roc, "PART", part)
    assert ours((maps, masks)) == whole
    assert ours(*zip(maps.split(1), masks.split(1), strict=True)) == whole
    assert ours((maps[4:], masks[4:]), (maps[:1], masks[:1]), (maps[1:4], masks[1:4])) == whole
    assert ours((maps.squeeze(1), masks.unsqueeze(1))) == whole


def test_any_range_ranks(maps_and_masks):
    """Anomalib's AUROC squashes large scores with a sigmoid, which makes them equal."""
    maps, masks = maps_and_masks
    large = 1024 * maps + 32  # exact in float32 for three decimals
    small = ours((maps.round(decimals=3), masks))
    assert ours((1024 * maps.round(decimals=3), masks)) == small
    assert stock((large, masks))["AUROC"] == pytest.approx(0.5, abs=1e-3)
    assert ours((-1 / large, masks)) == pytest.approx(ours((large, masks)), abs=1e-5)


def test_infinities_and_signed_zeros():
    inf = float("inf")
    maps = torch.tensor([[[inf, -0.0, -inf], [0.0, -inf, inf]]])
    masks = torch.tensor([[[True, True, True], [False, False, False]]])
    assert compute(pixel.AUROC(), (maps, masks)) == pytest.approx(0.5)


@pytest.mark.parametrize(("value", "missing"), [(False, "anomalous"), (True, "normal")])
@pytest.mark.filterwarnings("ignore:No (positive|negative) samples")
def test_one_kind_of_pixels_only(value, missing, maps_and_masks):
    batch = maps_and_masks[0], torch.full_like(maps_and_masks[1], value)
    with pytest.warns(UserWarning, match=f"no {missing} pixels"):
        found = ours(batch)
    assert found == stock(batch)


def test_regions_are_those_of_anomalib():
    masks = torch.rand(4, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.7
    masks[1] = False
    labels = connected_components_cpu(masks.unsqueeze(1).float()).squeeze(1)
    assert torch.equal(pixel.region_areas(masks), labels.flatten().bincount()[labels[masks]].float())
    assert pixel.region_areas(masks[1:2]).shape == (0,)


def test_maps_stay_as_they_are_and_the_metric_goes_on(maps_and_masks):
    """A metric can be computed again, and go on with more."""
    maps, masks = maps_and_masks
    metric, before = pixel.AUPRO(), maps.clone()
    first = compute(metric, (maps[:3], masks[:3]))
    assert torch.equal(maps, before)
    metric._computed = None
    assert metric.compute().item() == first
    assert compute(metric, (maps[3:], masks[3:])) == ours((maps, masks))["AUPRO"]


@pytest.mark.parametrize("limit", [0.01, 0.3, 0.999])
@pytest.mark.parametrize("decimals", [6, 1])
def test_auroc_up_to_a_limit(limit, decimals, maps_and_masks):
    maps, masks = maps_and_masks[0].round(decimals=decimals), maps_and_masks[1]
    rates, heights, _ = roc_curve(masks.flatten(), maps.flatten(), drop_intermediate=False)
    inside = rates <= limit
    expected = np.trapezoid([*heights[inside], np.interp(limit, rates, heights)], [*rates[inside], limit]) / limit
    assert compute(pixel.AUROC(fpr_limit=limit), (maps, masks)) == pytest.approx(expected, abs=1e-6)


def test_without_masks():
    batch = SimpleNamespace(anomaly_map=torch.rand(1, 1, 4, 4), gt_mask=None)
    metric = pixel.AUROC(strict=False)
    metric.update(batch)
    assert metric.compute() is None
    with pytest.raises(ValueError, match="gt_mask"):
        pixel.AUROC().update(batch)


def test_nan(maps_and_masks):
    maps, masks = maps_and_masks
    maps[0, 0, 0, :2] = float("nan")
    with pytest.raises(ValueError, match="2 of 4608 pixel scores are NaN"):
        compute(pixel.AP(), (maps, masks))
    with pytest.raises(ValueError, match="2 of 4608 pixel scores are NaN"):
        compute(pixel.AUPROPerImage(), (maps, masks))


def test_other_size(maps_and_masks):
    maps, masks = maps_and_masks
    with pytest.raises(ValueError, match=r"must have one shape \(B, H, W\), got \(6, 1, 24, 32\) and \(6, 24, 16\)"):
        compute(pixel.AP(), (maps, masks[..., :16]))


@pytest.mark.parametrize("limit", [0, 1.1])
@pytest.mark.parametrize("metric", [pixel.AUPRO, pixel.AUROC, pixel.SPRO])
def test_impossible_limit(metric, limit):
    with pytest.raises(ValueError, match=rf"fpr_limit must be in \(0, 1\], got {limit}"):
        metric(fpr_limit=limit)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_average_precision_of_images(shape):
    """Some of Anomalib's models give scores of shape (B, 1)."""
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3 == 0
    metric = image.AP()
    for part in (slice(0, 17), slice(17, 40)):
        metric.update(SimpleNamespace(pred_score=scores[part].reshape(shape), gt_label=labels[part]))
    assert metric.compute().item() == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
