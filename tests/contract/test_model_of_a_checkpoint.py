"""Contract point 4: a checkpoint alone is enough to build its model."""

from pathlib import Path

import torch
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from cases import Case
from runs import Trained

from anomalib_pack.restoring import model_from_checkpoint


@torch.no_grad()
def test_a_model_from_its_checkpoint(trained: Trained, model_class: type[AnomalibModule], case: Case) -> None:
    """Class, arguments, statistics: the same predictions as by the class itself."""
    images = torch.rand(2, 3, *case.other_size)
    expected = model_class.load_from_checkpoint(trained.checkpoint).eval()
    model = model_from_checkpoint(trained.checkpoint)
    assert type(model) is model_class
    assert {name: model.hparams[name] for name in case.arguments} == {
        name: expected.hparams[name] for name in case.arguments
    }
    for name, value in expected(images)._asdict().items():
        torch.testing.assert_close(getattr(model(images), name), value, atol=0, rtol=0)


def test_the_post_processor_of_a_checkpoint(
    trained: Trained, model_class: type[AnomalibModule], tmp_path: Path
) -> None:
    """Its settings tell its class: a model that was trained with Anomalib's own gets that one."""
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    checkpoint["anomalib_post_processor_config"] = PostProcessor(image_sensitivity=0.7).checkpoint_config()
    torch.save(checkpoint, tmp_path / "stock.ckpt")
    post_processor = model_from_checkpoint(tmp_path / "stock.ckpt").post_processor
    assert type(post_processor) is PostProcessor
    assert post_processor.image_sensitivity == 0.7
    assert post_processor.image_max == model_from_checkpoint(trained.checkpoint).post_processor.image_max
