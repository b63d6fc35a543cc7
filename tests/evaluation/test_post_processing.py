import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.metrics import roc_auc_score

from anomalib_pack.post_processing import (
    CHUNK,
    RankPreservingPostProcessor,
    denormalize,
    f1_adaptive_threshold,
    normalize,
)

# All that the post-processor reads of a trainer: is this a sanity check, and does the sampler repeat samples?
WITHOUT_SAMPLER = SimpleNamespace(_combined_loader=SimpleNamespace(iterables=None))
TRAINER = SimpleNamespace(
    sanity_checking=False, state=SimpleNamespace(fn=TrainerFn.VALIDATING), validate_loop=WITHOUT_SAMPLER
)


def random_batch(seed, count=12, size=8, scale=30.0, anomalous=None, masks=True):
    """Scores and maps in the tens; anomalous images are higher by half the spread."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2 == 0 if anomalous is None else torch.full((count,), anomalous)
    gt_mask = torch.zeros(count, size, size, dtype=torch.bool)
    gt_mask[labels, 2:5, 3:6] = True
    anomaly_map = scale * (1 + torch.rand(count, size, size, generator=generator) + 0.5 * gt_mask)
    return ImageBatch(
        image=torch.zeros(count, 3, size, size),
        image_path=[f"{index}.png" for index in range(count)],
        anomaly_map=anomaly_map,
        pred_score=scale * (1 + torch.rand(count, generator=generator) + 0.5 * labels),
        gt_label=labels,
        gt_mask=gt_mask if masks else None,
    )


def validated(*batches, **arguments):
    post_processor = RankPreservingPostProcessor(**arguments)
    for index, batch in enumerate(batches):
        post_processor.on_validation_batch_end(TRAINER, None, batch, batch, index)
    post_processor.on_validation_epoch_end(TRAINER, None)
    return post_processor


def as_predictions(batch, **changes):
    return InferenceBatch(**({"pred_score": batch.pred_score, "anomaly_map": batch.anomaly_map} | changes))


@pytest.mark.parametrize(("threshold", "scale"), [(0.0, 1.0), (34.6, 2.5), (-7.0, 1e-3), (1e6, 300.0)])
def test_normalize_is_monotone_with_the_threshold_at_one_half(threshold, scale):
    threshold, scale = torch.tensor(threshold), torch.tensor(scale)
    offsets = torch.cat([torch.logspace(-8, 6, 20_000), torch.zeros(1), -torch.logspace(-8, 6, 20_000)])
    scores = (threshold + scale * offsets).sort().values
    normalized = normalize(scores, threshold, scale)
    assert (normalized.diff() >= 0).all()
    assert normalized.min() > 0
    assert normalized.max() < 1
    assert normalize(threshold, threshold, scale) == 0.5
    assert (normalized[scores < threshold] <= 0.5).all()
    expected = 0.5 + 0.5 * ((z := (scores.double() - threshold) / scale) / (1 + z.abs()))
    np.testing.assert_allclose(normalized, expected, atol=1e-6)


def test_normalize_separates_scores_far_outside_the_validation_range():
    scores = torch.linspace(-1000, 1000, 2001)  # In ranges of the validation scores, 1 apart.
    assert (normalize(4 * scores, torch.tensor(0.0), torch.tensor(1.0)).diff() > 0).all()


@pytest.mark.parametrize("normalized", [0.01, 0.3, 0.5, 0.77, 0.999])
def test_round_trip(normalized):
    threshold, scale = torch.tensor(34.6), torch.tensor(2.5)
    raw = denormalize(normalized, threshold, scale)
    torch.testing.assert_close(normalize(raw, threshold, scale).item(), normalized, atol=1e-5, rtol=0)


def test_denormalize_ends():
    assert denormalize(0.0, torch.tensor(3.0), torch.tensor(2.0)) == float("-inf")
    assert denormalize(1.0, torch.tensor(3.0), torch.tensor(2.0)) == float("inf")


def test_threshold_is_stock_with_anomalies_in_validation():
    batches = [random_batch(0), random_batch(1)]
    post_processor = validated(*batches)
    for name, fields in (("image", ["pred_score", "gt_label"]), ("pixel", ["anomaly_map", "gt_mask"])):
        stock = F1AdaptiveThreshold(fields=fields)
        for batch in batches:
            stock.update(batch)
        assert getattr(post_processor, f"{name}_threshold") == stock.compute()


@pytest.mark.parametrize("levels", [3, 50, 10_000_000])
@pytest.mark.parametrize("count", [1, 40, 5000])
def test_f1_adaptive_threshold_is_stock(count, levels):
    """With many equal scores, and with nearly none."""
    generator = torch.Generator().manual_seed(count)
    is_anomalous = torch.rand(count, generator=generator) < 0.3
    is_anomalous[0] = True
    scores = torch.randint(levels, (count,), generator=generator) + levels // 3 * is_anomalous
    stock = F1AdaptiveThreshold(fields=["pred_score", "gt_label"])
    stock.update(SimpleNamespace(pred_score=scores.float(), gt_label=is_anomalous))
    assert f1_adaptive_threshold(scores.float(), is_anomalous) == stock.compute()


def test_f1_adaptive_threshold_of_several_chunks():
    scores = torch.arange(CHUNK + 1000.0).flip(0)
    assert f1_adaptive_threshold(scores, scores >= CHUNK - 500) == CHUNK - 500


@pytest.mark.parametrize("masks", [True, False])
def test_threshold_is_a_quantile_with_normal_validation(masks):
    batches = [random_batch(seed, anomalous=False, masks=masks) for seed in range(3)]
    post_processor = validated(*batches, image_quantile=0.9, pixel_quantile=0.95)
    scores = np.concatenate([batch.pred_score for batch in batches])
    maps = np.concatenate([batch.anomaly_map for batch in batches])
    np.testing.assert_allclose(post_processor.image_threshold, np.quantile(scores, 0.9), rtol=1e-6)
    np.testing.assert_allclose(post_processor.pixel_threshold, np.quantile(maps, 0.95), rtol=1e-6)


def test_pixel_threshold_without_masks_is_a_quantile_of_normal_images():
    batch = random_batch(0, masks=False)
    post_processor = validated(batch, pixel_quantile=0.95)
    normal = batch.anomaly_map[~batch.gt_label]
    np.testing.assert_allclose(post_processor.pixel_threshold, np.quantile(normal, 0.95), rtol=1e-6)


def test_labels_compare_raw_scores_and_agree_at_equality():
    post_processor = validated(random_batch(0))
    threshold = post_processor.image_threshold
    below = torch.nextafter(threshold, torch.tensor(0.0))
    batch = random_batch(1, count=2)
    batch.pred_score = torch.stack([threshold, below])
    exported = post_processor(as_predictions(batch))
    post_processor.post_process_batch(batch)
    assert batch.pred_label.tolist() == exported.pred_label.tolist() == [True, False]
    assert batch.pred_score[0] == 0.5


def test_every_anomaly_on_the_f1_threshold_is_found():
    """The stock class loses the sample that its threshold was taken from."""
    batch = random_batch(0, count=4)
    batch.gt_label = torch.tensor([False, False, True, True])
    batch.pred_score = torch.tensor([10.0, 11.0, 20.0, 30.0])
    expected = {RankPreservingPostProcessor: [False, False, True, True], PostProcessor: [False, False, False, True]}
    for post_processor_class, labels in expected.items():
        post_processor = post_processor_class()
        post_processor.on_validation_batch_end(TRAINER, None, batch, batch, 0)
        post_processor.on_validation_epoch_end(TRAINER, None)
        assert post_processor(as_predictions(batch)).pred_label.tolist() == labels


@pytest.mark.parametrize("sensitivity", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_labels_of_raw_and_normalised_scores_agree(sensitivity):
    post_processor = validated(random_batch(0), image_sensitivity=sensitivity, pixel_sensitivity=sensitivity)
    batch = random_batch(1, count=200)
    result = post_processor(as_predictions(batch))
    for normalized, label in ((result.pred_score, result.pred_label), (result.anomaly_map, result.pred_mask)):
        clear = (normalized - (1 - sensitivity)).abs() > 1e-6  # Within it rounding may decide.
        assert clear.float().mean() > 0.99
        assert torch.equal(label[clear], (normalized >= 1 - sensitivity)[clear])
    if sensitivity in {0.0, 1.0}:
        assert (result.pred_label == bool(sensitivity)).all()


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
def test_score_shapes(shape):
    post_processor = validated(random_batch(0))
    batch = random_batch(1)
    result = post_processor(as_predictions(batch, pred_score=batch.pred_score.reshape(shape)))
    assert result.pred_score.shape == result.pred_label.shape == shape


def test_missing_score_is_the_maximum_of_the_map():
    post_processor = validated(random_batch(0))
    batch = random_batch(1)
    result = post_processor(as_predictions(batch, pred_score=None))
    expected = post_processor(as_predictions(batch, pred_score=batch.anomaly_map.amax(dim=(1, 2))))
    assert torch.equal(result.pred_score, expected.pred_score)


def test_neither_score_nor_map():
    with pytest.raises(ValueError, match="At least one of pred_score or anomaly_map"):
        RankPreservingPostProcessor()(InferenceBatch())


def test_scores_without_map():
    post_processor = validated(random_batch(0))
    result = post_processor(as_predictions(random_batch(1), anomaly_map=None))
    assert result.anomaly_map is result.pred_mask is None
    assert result.pred_score is not None


def test_equal_validation_scores_keep_the_ranking():
    batch = random_batch(0, anomalous=False)
    batch.pred_score = torch.full((12,), 30.0)
    batch.anomaly_map = torch.full((12, 8, 8), 30.0)
    post_processor = validated(batch)
    scores = torch.tensor([29.0, 30.0, 31.0, 40.0])
    assert (normalized := post_processor(InferenceBatch(pred_score=scores)).pred_score)[1] == 0.5
    assert (normalized.diff() > 0).all()


def test_without_validation_scores_stay_and_a_warning_is_given(caplog):
    post_processor = RankPreservingPostProcessor()
    batch = random_batch(0)
    result = post_processor(as_predictions(batch))
    assert torch.equal(result.pred_score, batch.pred_score)
    assert torch.equal(result.anomaly_map, batch.anomaly_map)
    assert not result.pred_label.any()
    with caplog.at_level(logging.WARNING):
        post_processor.on_predict_start(None, None)
    assert "No validation run has set a threshold" in caplog.text


def test_without_normalization_labels_are_the_same():
    batch = random_batch(1)
    result = validated(random_batch(0), enable_normalization=False)(as_predictions(batch))
    expected = validated(random_batch(0))(as_predictions(batch))
    assert torch.equal(result.pred_score, batch.pred_score)
    assert torch.equal(result.pred_label, expected.pred_label)
    assert torch.equal(result.pred_mask, expected.pred_mask)


def test_without_thresholding():
    result = validated(random_batch(0), enable_thresholding=False)(as_predictions(random_batch(1)))
    assert result.pred_label is result.pred_mask is None
    assert 0 < result.pred_score.min() < result.pred_score.max() < 1


@pytest.mark.parametrize("field", ["pred_score", "anomaly_map"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_validation_scores_must_be_finite(field, value):
    batch = random_batch(0)
    getattr(batch, field)[3, ...] = value
    with pytest.raises(ValueError, match=rf"{field} of image 3\.png is not"):
        validated(batch)


def test_sanity_check_is_not_validation():
    batch = random_batch(0)
    batch.pred_score[:] = float("nan")
    post_processor = RankPreservingPostProcessor()
    trainer = SimpleNamespace(sanity_checking=True)
    post_processor.on_validation_batch_end(trainer, None, batch, batch, 0)
    post_processor.on_validation_epoch_end(trainer, None)
    assert post_processor.image_threshold.isnan()


@pytest.mark.parametrize("name", ["image_sensitivity", "pixel_sensitivity", "image_quantile", "pixel_quantile"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_probabilities_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
        RankPreservingPostProcessor(**{name: value})


def test_sensitivity_needs_normalization():
    with pytest.raises(ValueError, match="need enable_normalization=True"):
        RankPreservingPostProcessor(enable_normalization=False, image_sensitivity=0.6)


def test_checkpoint_round_trip():
    post_processor = validated(random_batch(0), image_quantile=0.9, pixel_quantile=0.8, image_sensitivity=0.6)
    restored = RankPreservingPostProcessor()
    restored.load_state_dict(post_processor.state_dict())
    restored.load_checkpoint_config(post_processor.checkpoint_config())
    assert restored.checkpoint_config() == post_processor.checkpoint_config()
    assert (restored.image_quantile, restored.pixel_quantile) == (0.9, 0.8)
    predictions = as_predictions(random_batch(1))
    for ours, theirs in zip(restored(predictions), post_processor(predictions), strict=True):
        if ours is not None:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("statistics", ["validated", "none"])
def test_export(statistics):
    post_processor = validated(random_batch(0)) if statistics == "validated" else RankPreservingPostProcessor()

    class Exported(torch.nn.Module):
        """Models are exported with tensors as inputs and outputs."""

        def __init__(self):
            super().__init__()
            self.post_processor = post_processor

        def forward(self, score, anomaly_map):
            result = self.post_processor(InferenceBatch(pred_score=score, anomaly_map=anomaly_map))
            return result.pred_score, result.pred_label, result.anomaly_map, result.pred_mask

    batch = random_batch(1)
    batch.pred_score[0] = post_processor.image_threshold.nan_to_num(1.0)
    arguments = (batch.pred_score, batch.anomaly_map)
    program = torch.export.export(Exported(), arguments, dynamic_shapes=({0: torch.export.Dim("b")},) * 2)
    for ours, theirs in zip(program.module()(*arguments), Exported()(*arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_normalised_scores_is_that_of_raw_scores(seed):
    post_processor = validated(random_batch(seed, anomalous=False))
    batch = random_batch(seed + 100, count=60)
    result = post_processor(as_predictions(batch))
    assert roc_auc_score(batch.gt_label, result.pred_score) == roc_auc_score(batch.gt_label, batch.pred_score)
