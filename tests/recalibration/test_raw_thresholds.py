"""Thresholds on scores that are known: labels by the post-processor itself, and a search through all thresholds."""

import math

import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from recalibration_cases import POST_PROCESSORS
from sklearn.metrics import f1_score
from torch import Tensor

from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_pack.quantiles import drawn
from anomalib_pack.recalibration.measuring import Measured
from anomalib_pack.recalibration.thresholds import Goal, recalibrate
from anomalib_pack.records.thresholds import image_thresholds


def measured(count: int, shift: float, seed: int, offset: float = 0) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    scores = offset + shift + torch.randn(count, generator=generator)
    pixels = offset + torch.randn(count * 1000, generator=generator) / 2
    return Measured(scores, pixels, torch.stack(pixels.aminmax()))


def labelled(post_processor: PostProcessor, scores: Tensor) -> Tensor:
    return post_processor(InferenceBatch(pred_score=scores)).pred_label.bool()


@pytest.fixture(params=POST_PROCESSORS)
def post_processor(request: pytest.FixtureRequest) -> PostProcessor:
    return POST_PROCESSORS[request.param]()


@pytest.mark.parametrize("offset", [0, 100, -100])
@pytest.mark.parametrize(
    ("normal_count", "anomalous_count", "shift"), [(30, 20, 1), (30, 2, 3), (5, 40, 0), (1, 1, -2)]
)
def test_best_f1(
    post_processor: PostProcessor, normal_count: int, anomalous_count: int, shift: float, offset: float
) -> None:
    """No threshold has a better one, as the post-processor decides."""
    normal, anomalous = measured(normal_count, 0, 1, offset), measured(anomalous_count, shift, 2, offset)
    recalibrate(post_processor, normal, anomalous, goal=Goal())
    scores = torch.cat([normal.scores, anomalous.scores])
    truth = torch.arange(len(scores)) >= normal_count
    best = max(f1_score(truth, scores >= threshold) for threshold in scores)
    assert f1_score(truth, labelled(post_processor, scores)) == pytest.approx(best)


def test_equal_scores(post_processor: PostProcessor) -> None:
    """Of images and pixels: labels are defined, and all are equal."""
    normal, anomalous = measured(4, 0, 1), measured(4, 0, 2)
    for each in (normal, anomalous):
        each.scores.fill_(3.0)
        each.pixels.fill_(3.0)
        each.pixel_range.fill_(3.0)
    recalibrate(post_processor, normal, anomalous, goal=Goal())
    assert labelled(post_processor, anomalous.scores).all()


@pytest.mark.parametrize("threshold", [-3.0, 0.3, 12.5])
def test_raw_threshold(post_processor: PostProcessor, threshold: float) -> None:
    """Also beyond all scores of the images; and the records of a run say the same number."""
    recalibrate(post_processor, measured(30, 0, 1), goal=Goal(threshold=threshold))
    scores = threshold + torch.tensor([-2.0, -0.1, -1e-3, 1e-3, 0.1, 2.0])
    assert labelled(post_processor, scores).tolist() == [False, False, False, True, True, True]
    assert image_thresholds(post_processor).raw == pytest.approx(threshold, abs=1e-5)
    assert float(post_processor.image_max - post_processor.image_min) > 1


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_false_alarms(post_processor: PostProcessor, share: float) -> None:
    """Of images and pixels, and with anomalies too, which then only widen the range of normalisation."""
    normal = measured(1000, 0, 1)
    for anomalous in (None, measured(50, 9, 2)):
        recalibrate(post_processor, normal, anomalous, goal=Goal(false_alarms=share))
        assert labelled(post_processor, normal.scores).sum() == 1000 * share
        maps = normal.pixels.view(1000, 1, 50, 20)
        masks = post_processor(InferenceBatch(pred_score=normal.scores, anomaly_map=maps)).pred_mask
        assert masks.float().mean().item() == pytest.approx(share, rel=1e-3)
    assert post_processor.image_max == anomalous.scores.max()
    assert post_processor.pixel_max == max(normal.pixel_range[1], anomalous.pixel_range[1])


def test_the_pixel_quantile_of_the_post_processor() -> None:
    post_processor = RankPreservingPostProcessor(pixel_quantile=0.9)
    normal = measured(30, 0, 1)
    for goal, share in ((Goal(), 0.1), (Goal(threshold=1), 0.1), (Goal(false_alarms=0.02), 0.02)):
        recalibrate(post_processor, normal, measured(9, 1, 2), goal=goal)
        assert (normal.pixels >= post_processor.pixel_threshold).float().mean().item() == pytest.approx(share, rel=1e-3)


def test_without_maps(post_processor: PostProcessor) -> None:
    normal = Measured(torch.arange(10.0), None, None)
    recalibrate(post_processor, normal, goal=Goal(false_alarms=0.2))
    assert labelled(post_processor, normal.scores).sum() == 2
    assert post_processor.pixel_min.isnan()


def test_memory_of_pixels_is_bounded() -> None:
    """A sample of the pixels has their quantiles; few are all kept."""
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(values, 400_000), values)
    sample = drawn(values, 100_000, seed=3)
    assert sample.shape == (100_000,)
    assert torch.equal(sample, drawn(values, 100_000, seed=3))
    assert not torch.equal(sample, drawn(values, 100_000, seed=4))
    # Five standard errors of a share of 0.01 among so many.
    assert (sample > values.quantile(0.99)).float().mean() == pytest.approx(0.01, abs=5 * math.sqrt(0.0099 / 100_000))
